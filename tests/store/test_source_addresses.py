"""SEQUIN_RESTRICT_SOURCES: a source's host is judged on the address that is dialled."""
from __future__ import annotations

import socket
from typing import Any

import psycopg
import pytest

from consumers.models import Source
from consumers.source_connection import SourceUnreachable, connect, conninfo

HERE = {"database": "d", "username": "u", "password": "p"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1", "/var/run/postgresql", "0.0.0.0", "2130706433"])
def test_inner_addresses_are_refused_before_they_are_dialled(settings: Any, monkeypatch: Any, host: str) -> None:
    settings.SEQUIN_RESTRICT_SOURCES, settings.SEQUIN_ALLOWED_NETWORKS = True, []
    monkeypatch.setattr(psycopg, "connect", lambda *_, **__: pytest.fail("dialled"))
    with pytest.raises(SourceUnreachable, match="not a public address"):
        connect(Source(host=host, port=5432, **HERE))


def test_the_vetted_address_is_the_one_dialled(settings: Any, monkeypatch: Any) -> None:
    settings.SEQUIN_RESTRICT_SOURCES, settings.SEQUIN_ALLOWED_NETWORKS = True, []
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 5432)), (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 5432))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    text = conninfo(Source(host="db.example.com", port=5432, **HERE))
    assert "hostaddr=93.184.216.34" in text and "host=db.example.com" in text, "the certificate is checked against the name"


def test_without_the_setting_any_host_goes(settings: Any) -> None:
    settings.SEQUIN_RESTRICT_SOURCES = False
    assert "hostaddr" not in conninfo(Source(host="10.1.2.3", port=5432, **HERE))
