"""Send one signed message to an endpoint, now, because a person asked.

How requests are sent is delivery's business, which this package does not know: the setting SEQUIN_SENDER names the
function, and it goes by the same rules of addresses as every push.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol
from uuid import uuid4

from django.conf import settings
from django.utils import timezone
from django.utils.module_loading import import_string

from consumers.models import HttpEndpoint


class Outcome(Protocol):
    """What became of it: delivery's own, as far as it is used here. `status` None: no answer came, `error` says why."""

    @property
    def status(self) -> int | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def response(self) -> str: ...
    @property
    def duration_ms(self) -> int: ...
    @property
    def ok(self) -> bool: ...


def send_test(endpoint: HttpEndpoint, path: str = "") -> Outcome:
    """A message such as a consumer would send, of a table that does not exist, marked as a test."""
    key = f"test-{uuid4().hex}"
    body = {
        "record": {"id": 1, "text": "a test message from Sequin"}, "changes": None, "action": "insert",
        "metadata": {"table_schema": "sequin", "table_name": "test", "record_pks": ["1"], "test": True,
                     "commit_timestamp": timezone.now().isoformat(), "idempotency_key": key},
    }  # fmt: skip
    secret_headers: Any = endpoint.secret_headers
    return sender()(
        url=endpoint.url + path, body=json.dumps(body).encode(), webhook_id=key, headers={**endpoint.headers, **secret_headers},
        secrets=endpoint.signing_secret, timeout_s=endpoint.timeout_ms / 1000,
    )  # fmt: skip


def sender() -> Callable[..., Outcome]:
    found: Any = import_string(settings.SEQUIN_SENDER)
    return found  # type: ignore[no-any-return]
