"""Read a request's JSON body within its limit."""
from __future__ import annotations

import json
import re
import secrets
from typing import Any

from django.core.exceptions import RequestDataTooBig

from consumers.api.errors import MAX_BODY_BYTES, BadParameter


class Numbers:
    """Keeps numbers as they were written: as texts in what is read, and as numbers again in what `written` makes of it."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._marked = re.compile(f'"{self._mark}([^"]*)"')

    def kept(self, digits: str) -> Any:
        value = float(digits)
        return value if json.dumps(value) == digits else self._mark + digits

    def written(self, value: Any) -> str:
        return self._marked.sub(r"\1", json.dumps(value, ensure_ascii=True))


def read_object(request: Any, numbers: Numbers | None = None) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object. Raises BadParameter, RequestDataTooBig."""
    body = _body(getattr(request, "_request", request))
    if not body.strip():
        return {}
    decoder = _DECODER if numbers is None else json.JSONDecoder(parse_constant=_refuse_constant, parse_float=numbers.kept)
    try:
        value = decoder.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except RecursionError:
        raise BadParameter("the body is nested too deeply") from None
    except ValueError as error:
        raise BadParameter(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadParameter(f"expected a JSON object, got {_JSON_TYPES[type(value)]}")
    return value


def _body(http: Any) -> bytes:
    try:
        length = int(http.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        raise BadParameter("Content-Length is not a number") from None
    if length > MAX_BODY_BYTES:
        raise RequestDataTooBig
    if "HTTP_TRANSFER_ENCODING" in http.META:
        return _chunked(http)
    body = bytes(http.body)
    if len(body) < length:  # half a call may be another call
        raise BadParameter(f"the body ended after {len(body)} of the {length} bytes that Content-Length announced")
    return body


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


_JSON_TYPES = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # made once: to make one costs more than to read a small body
