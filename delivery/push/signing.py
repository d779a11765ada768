"""Sign a push as Standard Webhooks says. Pure.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""
from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from functools import lru_cache

from consumers.endpoint_rules import SIGNING_SECRET_PREFIX


def signature(secrets: str, webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """The `webhook-signature` header: one `v1,…` for each secret; two secrets, apart by a space, while one is rotated."""
    before = f"{webhook_id}.{timestamp_s}.".encode()
    made = []
    for keyed in _keyed(secrets):
        one = keyed.copy()
        one.update(before)
        one.update(body)
        made.append("v1," + binascii.b2a_base64(one.digest(), newline=False).decode())
    return " ".join(made)


def batch_id(idempotency_keys: list[str]) -> str:
    """The `webhook-id` of a batch: a digest of its messages' keys, the same whenever the same batch is sent."""
    return "batch_" + hashlib.sha256("\n".join(idempotency_keys).encode()).hexdigest()[:40]


@lru_cache(maxsize=1024)
def _keyed(secrets: str) -> tuple[hmac.HMAC, ...]:
    """Digests that have taken in their key already, to be copied."""
    return tuple(hmac.new(_key(secret), digestmod=hashlib.sha256) for secret in secrets.split())


def _key(secret: str) -> bytes:
    text = secret.removeprefix(SIGNING_SECRET_PREFIX)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return text.encode()
