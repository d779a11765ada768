"""Read and check the environment: every setting a user may make, with its default. Nothing else reads os.environ.

A bad value raises ImproperlyConfigured with one line that names the variable, what was expected and what came.
"""
from __future__ import annotations

import ipaddress
import os
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import environ
from cryptography.fernet import Fernet
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent
DURATION_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
HOST = r"\*|\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?|\[[0-9A-Fa-f:.]+\]"
ORIGIN = r"https?://(\*\.)?[A-Za-z0-9_.:\[\]-]+"
USER_NAME = r"[\w.@+-]{1,150}"  # what Django takes
LOG_LEVELS = ("debug", "info", "warning", "error")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Environment:
    """The settings, checked. Secrets among them: never printed."""

    database_url: str | None
    home: Path
    secret_key: str
    encryption_keys: list[str]
    allowed_hosts: list[str]
    csrf_trusted_origins: list[str]
    debug: bool
    admin_user: str
    admin_password: str | None
    broker_url: str | None
    email: dict[str, Any] | None
    email_from: str
    workers: int
    allowed_networks: list[Network]
    min_free_disk: str
    max_waiters: int
    retention: timedelta
    allow_plaintext: bool
    restrict_sources: bool
    metrics_public: bool
    log_format: str
    log_level: str


def read() -> Environment:
    """Read the environment and a `.env` file beside manage.py. Raises ImproperlyConfigured."""
    env = environ.Env()
    dotenv = BASE_DIR / ".env"
    if dotenv.is_file():
        env.read_env(str(dotenv))
    database_url = os.environ.get("DATABASE_URL") or None
    home = Path(os.environ.get("SEQUIN_HOME") or BASE_DIR / ".sequin").absolute()
    if database_url is not None:
        parse_database_url(database_url)
    return Environment(
        database_url=database_url,
        home=home,
        secret_key=_key("SECRET_KEY", database_url, home, lambda: secrets.token_urlsafe(50)),
        encryption_keys=_fernet_keys(_key("ENCRYPTION_KEYS", database_url, home, lambda: Fernet.generate_key().decode())),
        allowed_hosts=_each("ALLOWED_HOSTS", HOST, "names such as example.com, .example.com or *") or ["localhost", "127.0.0.1", "[::1]"],
        csrf_trusted_origins=_each("CSRF_TRUSTED_ORIGINS", ORIGIN, "origins such as https://example.com"),
        debug=_bool("DEBUG"),
        admin_user=_admin_user(),
        admin_password=os.environ.get("SEQUIN_ADMIN_PASSWORD") or None,
        broker_url=_broker_url(),
        email=_email(),
        email_from=os.environ.get("EMAIL_FROM") or "sequin@localhost",
        workers=_int("SEQUIN_WORKERS", os.cpu_count() or 1, 1, 256),
        allowed_networks=[_network(text) for text in _list("SEQUIN_ALLOWED_NETWORKS")],
        min_free_disk=_min_free_disk(),
        max_waiters=_int("SEQUIN_MAX_WAITERS", 1000, 0, 20_000),
        retention=duration("SEQUIN_RETENTION", os.environ.get("SEQUIN_RETENTION") or "7d"),
        allow_plaintext=_bool("SEQUIN_ALLOW_PLAINTEXT"),
        restrict_sources=_bool("SEQUIN_RESTRICT_SOURCES"),
        metrics_public=_bool("SEQUIN_METRICS_PUBLIC"),
        log_format=_choice("SEQUIN_LOG_FORMAT", "console", ("console", "json")),
        log_level=_choice("SEQUIN_LOG_LEVEL", "info", LOG_LEVELS).upper(),
    )


def parse_database_url(url: str) -> dict[str, Any]:
    """Django's DATABASES entry for a postgres:// URL; its query string becomes libpq options."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImproperlyConfigured(f"DATABASE_URL: {error}") from None
    if parts.scheme not in ("postgres", "postgresql", "psql", "pgsql"):
        raise ImproperlyConfigured(
            "DATABASE_URL: expected postgres://USER:PASSWORD@HOST:PORT/DATABASE (the store is Postgres 14 or newer),"
            f" got a URL that begins with {parts.scheme or 'nothing'!r}"
        )
    name = unquote(parts.path.lstrip("/"))
    if not name:
        raise ImproperlyConfigured("DATABASE_URL: names no database; expected postgres://USER:PASSWORD@HOST:PORT/DATABASE")
    options = dict(parse_qsl(parts.query))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": unquote(parts.hostname or options.pop("host", "")),
        "PORT": str(port or ""),
        "OPTIONS": options,
    }


def duration(name: str, text: str) -> timedelta:
    """`7d`, `12h`, `30m`, `45s` as a timedelta."""
    match = re.fullmatch(r"(\d{1,6})\s*([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise ImproperlyConfigured(f"{name}: expected a duration such as 7d, 12h, 30m or 45s, got {text!r}")
    return timedelta(**{DURATION_UNITS[match[2]]: int(match[1])})


def read_or_make(path: Path, make: Any) -> str:
    """The secret kept in `path` (0600), made on first use."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ImproperlyConfigured(f"SEQUIN_HOME: cannot read {path}: {error.strerror}") from None
    value = str(make())
    try:
        # Traversable for the user Postgres runs as when we are root; for an ordinary user nobody else may look in.
        path.parent.parent.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ImproperlyConfigured(f"SEQUIN_HOME: cannot write {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(value + "\n")
    return value


def _key(name: str, database_url: str | None, home: Path, make: Any) -> str:
    value = os.environ.get(name, "").strip()
    if value:
        return value
    if database_url is not None:
        raise ImproperlyConfigured(f"{name}: is required when DATABASE_URL is set, and is not set")
    return read_or_make(home / "keys" / name.lower(), make)


def _fernet_keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    for number, key in enumerate(keys, 1):
        try:
            Fernet(key)
        except ValueError:
            raise ImproperlyConfigured(
                f"ENCRYPTION_KEYS: key {number} of {len(keys)} is not a Fernet key (32 bytes, URL-safe base64). Make one with:"
                ' python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'
            ) from None
    if not keys:
        raise ImproperlyConfigured("ENCRYPTION_KEYS: expected at least one Fernet key, got none")
    return keys


def _list(name: str) -> list[str]:
    return [item.strip() for item in os.environ.get(name, "").split(",") if item.strip()]


def _each(name: str, pattern: str, expected: str) -> list[str]:
    items = _list(name)
    for item in items:
        if not re.fullmatch(pattern, item):
            raise ImproperlyConfigured(f"{name}: expected {expected}, apart by commas, got {item!r}")
    return items


def _admin_user() -> str:
    name = os.environ.get("SEQUIN_ADMIN_USER", "").strip() or "admin"
    if not re.fullmatch(USER_NAME, name):
        raise ImproperlyConfigured(f"SEQUIN_ADMIN_USER: expected 1 to 150 letters, digits, @ . + - or _, got {name!r}")
    return name


def _bool(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise ImproperlyConfigured(f"{name}: expected true or false, got {text!r}")


def _int(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
        raise ImproperlyConfigured(f"{name}: expected a whole number from {low} to {high}, got {text!r}")
    return int(text)


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    text = os.environ.get(name, "").strip().lower() or default
    if text not in choices:
        raise ImproperlyConfigured(f"{name}: expected one of {', '.join(choices)}, got {text!r}")
    return text


def _email() -> dict[str, Any] | None:
    """Django's EMAIL_… settings of an EMAIL_URL such as smtp://, smtp+tls:// or smtp+ssl://user:password@host:port."""
    url = os.environ.get("EMAIL_URL", "").strip()
    if not url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImproperlyConfigured(f"EMAIL_URL: {error}") from None
    if parts.scheme not in ("smtp", "smtp+tls", "smtp+ssl") or not parts.hostname:
        raise ImproperlyConfigured("EMAIL_URL: expected smtp://, smtp+tls:// or smtp+ssl:// and user:password@host:port")
    return {
        "EMAIL_HOST": parts.hostname,
        "EMAIL_PORT": port or {"smtp": 25, "smtp+tls": 587, "smtp+ssl": 465}[parts.scheme],
        "EMAIL_HOST_USER": unquote(parts.username or ""),
        "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
        "EMAIL_USE_TLS": parts.scheme == "smtp+tls",
        "EMAIL_USE_SSL": parts.scheme == "smtp+ssl",
        "EMAIL_TIMEOUT": 10,
    }


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ImproperlyConfigured(f"SEQUIN_ALLOWED_NETWORKS: expected CIDRs such as 10.0.0.0/8: {error}") from None


def _broker_url() -> str | None:
    url = os.environ.get("Q_BROKER_URL", "").strip()
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise ImproperlyConfigured(f"Q_BROKER_URL: {error}") from None
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise ImproperlyConfigured("Q_BROKER_URL: expected redis://HOST:PORT/DB, or unset for Postgres as the broker")
    return url or None


def _min_free_disk() -> str:
    text = os.environ.get("SEQUIN_MIN_FREE_DISK", "").strip() or "10%"
    if not re.fullmatch(r"\d{1,2}%|\d{1,6}\s*[MGT]B", text):
        raise ImproperlyConfigured(f"SEQUIN_MIN_FREE_DISK: expected a share such as 10% or a size such as 20GB, got {text!r}")
    return text

