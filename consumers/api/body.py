"""Read a request's JSON body within its limit."""
from __future__ import annotations

import json
from typing import Any

from django.core.exceptions import RequestDataTooBig

from consumers.api.errors import MAX_BODY_BYTES, BadParameter


def read_object(request: Any) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object. Raises BadParameter, RequestDataTooBig."""
    http = getattr(request, "_request", request)
    try:
        length = int(http.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        raise BadParameter("Content-Length is not a number") from None
    if length > MAX_BODY_BYTES:
        raise RequestDataTooBig
    body = _chunked(http) if "HTTP_TRANSFER_ENCODING" in http.META else http.body
    if not body.strip():
        return {}
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadParameter(f"expected a JSON object, got {type(value).__name__}")
    return value


def _chunked(http: Any) -> bytes:
    """A body without a length: Django takes it for an empty one, so it is read from the server, which ends it."""
    if not hasattr(http, "_chunked_body"):
        http._chunked_body = http.META["wsgi.input"].read(MAX_BODY_BYTES + 1)
    body: bytes = http._chunked_body
    if len(body) > MAX_BODY_BYTES:
        raise RequestDataTooBig
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
