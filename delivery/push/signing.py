"""Sign a push as Standard Webhooks says. Pure.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

PREFIX = "whsec_"


def signature(secrets: str, webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """The `webhook-signature` header: one `v1,…` for each secret; two secrets, apart by a space, while one is rotated."""
    signed = f"{webhook_id}.{timestamp_s}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.new(_key(secret), signed, hashlib.sha256).digest()).decode() for secret in secrets.split()
    )


def batch_id(idempotency_keys: list[str]) -> str:
    """The `webhook-id` of a batch: a digest of its messages' keys, the same whenever the same batch is sent."""
    return "batch_" + hashlib.sha256("\n".join(idempotency_keys).encode()).hexdigest()[:40]


def _key(secret: str) -> bytes:
    text = secret.removeprefix(PREFIX)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return text.encode()
