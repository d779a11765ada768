"""Logging in: failures make one wait, cookies are kept from scripts, a TLS proxy makes them secure."""
from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client
from django.utils import timezone

from consumers.audit import AuditEntry
from consumers.login import LoginFailure

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def admin() -> None:
    get_user_model().objects.create_superuser("admin", "", "the right password")


def login(password: str, *, name: str = "admin", address: str = "203.0.113.1") -> Any:
    return Client().post("/admin/login/", {"username": name, "password": password}, REMOTE_ADDR=address)


def test_five_failures_make_one_wait_even_with_the_right_password() -> None:
    for _ in range(5):
        assert login("wrong").status_code == 200
    refused = login("the right password")
    assert refused.status_code == 200 and "Too many failed logins" in refused.content.decode()
    assert AuditEntry.objects.filter(action="login_failed", subject="user admin").count() == 5
    # The owner comes from elsewhere, and is not locked out by a stranger.
    assert login("the right password", address="203.0.113.2").status_code == 302
    LoginFailure.objects.update(at=timezone.now() - timedelta(minutes=6))
    assert login("the right password").status_code == 302
    assert AuditEntry.objects.filter(action="login", actor="user admin").count() == 2


def test_one_address_that_tries_many_names_waits_too() -> None:
    for number in range(29):
        LoginFailure.objects.create(name=f"user-{number}", address="203.0.113.1")
    assert login("the right password").status_code == 302
    login("wrong", name="user-29")
    assert "Too many failed logins" in login("the right password").content.decode()


def test_a_login_forgets_its_own_failures() -> None:
    for _ in range(4):
        login("wrong")
    assert login("the right password").status_code == 302
    assert not LoginFailure.objects.exists()


def test_cookies_are_kept_from_scripts_and_the_api_takes_none() -> None:
    client = Client()
    answer = client.post("/admin/login/", {"username": "admin", "password": "the right password"})
    cookie = answer.cookies["sequin_session"]
    assert cookie["httponly"] and cookie["samesite"] == "Lax"
    assert client.get("/admin/").status_code == 200
    assert client.get("/api/consumers").status_code == 401


def test_pages_are_not_kept_by_caches_nor_framed(settings: Any) -> None:
    answer = Client().get("/admin/login/")
    assert "frame-ancestors 'none'" in answer["Content-Security-Policy"] and "'unsafe-eval'" not in answer["Content-Security-Policy"]
    assert "no-store" in answer["Cache-Control"] and answer["X-Frame-Options"] == "DENY" and "Strict-Transport-Security" not in answer
    settings.SESSION_COOKIE_SECURE = True
    assert "max-age" in Client().get("/admin/login/")["Strict-Transport-Security"]
