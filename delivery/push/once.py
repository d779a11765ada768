"""Send one request and wait for what becomes of it: test messages and alerts. Pushes go through pumps."""
from __future__ import annotations

import time

from django.conf import settings

from delivery.push import signing
from delivery.push.transport import Headers, Outcome, Request, Transport

GRACE_S = 2.0


def post(
    *, url: str, body: bytes, timeout_s: float, headers: dict[str, str] | None = None, secrets: str = "", webhook_id: str = ""
) -> Outcome:
    """One POST of JSON by the rules of every push; signed when there are secrets."""
    all_headers = {"Content-Type": "application/json"}
    if secrets:
        now = int(time.time())
        all_headers |= {
            "webhook-id": webhook_id, "webhook-timestamp": str(now), "webhook-signature": signing.signature(secrets, webhook_id, now, body),
        }  # fmt: skip
    transport = Transport(settings.SEQUIN_ALLOWED_NETWORKS)
    end = time.monotonic() + timeout_s + GRACE_S
    try:
        transport.submit(Request(url, Headers({**all_headers, **(headers or {})}), body, timeout_s, None))
        while (left_s := end - time.monotonic()) > 0:
            for outcome in transport.step(left_s):
                return outcome
        return Outcome(None, None, f"no answer within {timeout_s:g} s", None, "", int(timeout_s * 1000))
    finally:
        transport.close()
