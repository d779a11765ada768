"""What an endpoint may be: URLs and headers that cannot smuggle anything."""
from __future__ import annotations

from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from consumers.endpoint_rules import check_headers, check_signing_secrets, check_url


@pytest.mark.parametrize(
    "headers",
    [
        {"x": "a\r\nInjected: 1"}, {"x": "a\nb"}, {"x": "a\rb"}, {"x": "a\0b"}, {"x": "a\r\n folded"}, {"x\r\ny": "a"}, {"x y": "a"}, {"": "a"},
        {"x:": "a"}, {"é": "a"}, {"Host": "a"}, {"HOST": "a"}, {"Content-Length": "1"}, {"transfer-encoding": "chunked"},
        {"Connection": "close"}, {"content-type": "text/html"}, {"webhook-id": "x"}, {"Webhook-Signature": "x"}, {"webhook-anything": "x"},
        {"x": "a\x0bb"}, {"x": "a\x0cb"}, {"x": "a\x1bb"}, {"x": "a\x7fb"}, {"x": "a\u2028b"}, {"Upgrade": "h2c"}, {"TE": "trailers"},
        {"Trailer": "x"}, {"Keep-Alive": "1"}, {"Expect": "100-continue"},
        {"x": 1}, {"x": None}, {"x": ["a"]}, ["x"], "x: y",
    ],
)  # fmt: skip
def test_headers_that_are_refused(headers: Any) -> None:
    assert check_headers(headers)


@pytest.mark.parametrize("headers", [{}, {"X-Team": "shop"}, {"authorization": "Bearer a.b-c=="}, {"x": ""}, {"x": "tab\tinside"}])
def test_headers_that_are_fine(headers: Any) -> None:
    assert check_headers(headers) is None


def test_a_header_value_that_is_too_long_is_told_so() -> None:
    assert check_headers({"x": "a" * 8000}) is None
    assert "8001 characters" in str(check_headers({"x": "a" * 8001}))


@pytest.mark.parametrize("secret", [
    "", " ", "whsec_", "short", "whsec_" + "A" * 28, "whsec_" + "A" * 88, "A" * 32, "whsec_" + "!" * 32, "whsec_" + "-_" * 16,
    "whsec_" + "A" * 33, "whsec_" + "A" * 34, "whsec_" + "A" * 33 + "=", "whsec_" + "A" * 32 + "=",
])  # fmt: skip
def test_signing_secrets_that_are_refused(secret: str) -> None:
    assert check_signing_secrets(secret)
    assert check_signing_secrets(f"whsec_{'A' * 32} {secret}") or not secret.strip()


@pytest.mark.parametrize("secret", ["whsec_" + "A" * 32, "whsec_" + "A" * 34 + "==", "whsec_" + "+/" * 16, "whsec_" + "A" * 86 + "=="])
def test_signing_secrets_that_are_fine_are_to_the_receivers_library_too(secret: str) -> None:
    assert check_signing_secrets(secret) is None and check_signing_secrets(f"{secret} {secret}") is None
    assert Webhook(secret)


@pytest.mark.parametrize(
    "url",
    ["ftp://example.com/", "file:///etc/passwd", "gopher://example.com", "//example.com/", "example.com", "", "http://", "http:///path",
     "https://user:hunter2@example.com/", "https://user@example.com/", "http://example.com:99999/", "http://exa mple.com/", "http://a\r\nb/",
     "javascript:alert(1)", "http://example.com/\0"],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    problem = check_url(url)
    assert problem and "hunter2" not in problem


@pytest.mark.parametrize("url", ["https://example.com/hooks?a=b", "http://127.0.0.1:8080/", "https://[2001:db8::1]/x", "https://bücher.example/"])
def test_urls_that_are_fine(url: str) -> None:
    assert check_url(url) is None
