"""What may stand in an endpoint's URL and headers. Pure. The address actually dialled is judged by delivery."""
from __future__ import annotations

import base64
import re
from typing import Any
from urllib.parse import urlsplit

RESERVED_HEADERS = (
    "host", "content-length", "transfer-encoding", "connection", "content-type",
    # between two ends of one connection, which are not the endpoint's to set
    "expect", "keep-alive", "proxy-connection", "te", "trailer", "upgrade",
)  # fmt: skip
RESERVED_PREFIX = "webhook-"
MAX_HEADER_VALUE = 8000
SIGNING_SECRET_PREFIX = "whsec_"
SIGNING_SECRET_BYTES = range(24, 65)


def check_url(url: Any) -> str | None:
    """What is wrong with the URL, or None."""
    if not isinstance(url, str) or not url:
        return "expected a URL such as https://example.com/hooks"
    if re.search(r"[\x00-\x20\x7f]", url):
        return "may not contain spaces or control characters"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises when it is not a number)
    except ValueError as error:
        return f"is not a URL: {error}"
    if parts.scheme not in ("http", "https"):
        return f"expected http:// or https://, got {parts.scheme + '://' if parts.scheme else 'no scheme'}"
    if not parts.hostname:
        return "names no host"
    if parts.username is not None or parts.password is not None:
        return "may not contain a user or password: put them into secret_headers, where they are encrypted"
    if parts.fragment or url.endswith("#"):
        return "may not contain a fragment (#…): it is never sent"
    return None


def check_headers(headers: Any) -> str | None:
    """What is wrong with a mapping of header names to values, or None."""
    if not isinstance(headers, dict):
        return 'expected an object such as {"x-team": "shop"}'
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}", name):
            return f"{name!r} is not a header name"
        if name.lower() in RESERVED_HEADERS or name.lower().startswith(RESERVED_PREFIX):
            return f"{name} is reserved: it is set by the service"
        if isinstance(value, str) and len(value) > MAX_HEADER_VALUE:
            return f"the value of {name} has {len(value)} characters: expected at most {MAX_HEADER_VALUE}"
        if not isinstance(value, str) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value) or not _is_latin1(value):
            return f"the value of {name} is not a header value: expected one line of Latin-1 text"
    return None


def check_signing_secrets(secrets: str) -> str | None:
    """What is wrong with the signing secrets, apart by spaces, or None. What is no base64 the receivers' libraries refuse."""
    for secret in secrets.split() or [""]:
        text = secret.removeprefix(SIGNING_SECRET_PREFIX)
        try:
            key = base64.b64decode(text, validate=True) if len(text) % 4 == 0 else b""
        except ValueError:
            key = b""
        if not secret.startswith(SIGNING_SECRET_PREFIX) or len(key) not in SIGNING_SECRET_BYTES:
            return "expected whsec_ and base64 of 24 to 64 bytes; two, apart by a space, while rotating"
    return None


def _is_latin1(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True
