"""Settings are checked when they are read: a bad value is one line that names the variable, a good one is taken."""
from __future__ import annotations

from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from sequinapp import env

BAD = [
    ("SEQUIN_ADMIN_USER", "a b"), ("SEQUIN_ADMIN_USER", "x" * 151), ("ALLOWED_HOSTS", "https://example.com"), ("ALLOWED_HOSTS", "a b"),
    ("CSRF_TRUSTED_ORIGINS", "example.com"), ("CSRF_TRUSTED_ORIGINS", "*"), ("Q_BROKER_URL", "redis://h:port/0"),
    ("DATABASE_URL", "postgres://h:99999/d"), ("SEQUIN_RETENTION", "7"), ("SEQUIN_MIN_FREE_DISK", "150%"), ("SEQUIN_WORKERS", "0"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATABASE_URL", "SECRET_KEY", "ENCRYPTION_KEYS", *(name for name, _ in BAD)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEQUIN_HOME", str(tmp_path))
    monkeypatch.setattr(env, "BASE_DIR", tmp_path)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name_in_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ImproperlyConfigured, match=f"^{name}: ") as refused:
        env.read()
    assert "\n" not in str(refused.value)


def test_good_values_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_HOSTS", "example.com, .example.org,*,127.0.0.1,[::1]")
    monkeypatch.setenv("CSRF_TRUSTED_ORIGINS", "https://example.com,https://*.example.org,http://localhost:8080,http://[::1]:80")
    monkeypatch.setenv("Q_BROKER_URL", "redis://:secret@h:6379/0")
    monkeypatch.setenv("SEQUIN_ADMIN_USER", "zoë@example.com")
    read = env.read()
    assert len(read.allowed_hosts) == 5 and len(read.csrf_trusted_origins) == 4 and read.admin_user == "zoë@example.com" and read.broker_url


def test_a_key_of_spaces_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://h/d")
    monkeypatch.setenv("SECRET_KEY", "  ")
    with pytest.raises(ImproperlyConfigured, match="^SECRET_KEY: is required"):
        env.read()


def test_a_dotenv_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQUIN_WORKERS", "3")
    monkeypatch.setenv("SEQUIN_RETENTION", "")  # so that what the file sets is undone after the test
    monkeypatch.delenv("SEQUIN_RETENTION")
    (tmp_path / ".env").write_text("SEQUIN_RETENTION=2h\nSEQUIN_WORKERS=4\n")
    read = env.read()
    assert (read.retention.total_seconds(), read.workers) == (7200, 3)
