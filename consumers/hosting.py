"""Recognise where a database is hosted and whether a pooler stands in front of it, and say what to change. Pure.

Poolers speak no replication protocol, or bend it; each provider has a direct host beside the pooled one. Sources: the
providers' manuals on logical replication and connection pooling.
"""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

PAUSE_COSTS = "paused: the slot keeps WAL on the source's disk until it is resumed"
POOLER_PORTS = {6432: "pgbouncer's usual port", 6543: "the port of Supabase's transaction pooler", 25061: "DigitalOcean's pool port"}


class Provider(NamedTuple):
    """A hoster of Postgres: how its users turn on logical replication and let a role replicate."""

    name: str
    logical: str
    replication: str


SELF = Provider(
    "", "ALTER SYSTEM SET wal_level = 'logical'; -- then restart the server", "ALTER ROLE {role} REPLICATION;"
)  # fmt: skip
SUPABASE = Provider(
    "Supabase", "-- wal_level is logical on every Supabase project; this server says otherwise: ask Supabase's support",
    "ALTER ROLE {role} REPLICATION; -- as the role postgres, in the SQL editor",
)  # fmt: skip
NEON = Provider(
    "Neon", "-- Neon console: Settings, Logical Replication, Enable; it cannot be turned off again",
    "-- make the role in the Neon console or with neonctl: such roles may replicate",
)  # fmt: skip
RDS = Provider(
    "Amazon RDS", "-- set rds.logical_replication = 1 in the instance's (Aurora: the cluster's) parameter group, then reboot",
    "GRANT rds_replication TO {role};",
)  # fmt: skip
CLOUD_SQL = Provider(
    "Google Cloud SQL", "-- set the flag cloudsql.logical_decoding = on, then restart the instance",
    "ALTER USER {role} WITH REPLICATION;",
)  # fmt: skip
AZURE = Provider(
    "Azure Database for PostgreSQL", "-- set the server parameter wal_level = logical, then restart the server",
    "ALTER ROLE {role} WITH REPLICATION;",
)  # fmt: skip

_HOSTS = (
    (r"\.supabase\.(co|com|in|red)$", SUPABASE),
    (r"\.neon\.(tech|build)$", NEON),
    (r"\.rds\.amazonaws\.com(\.cn)?$", RDS),
    (r"\.postgres\.database\.azure\.com$", AZURE),
)
# Settings that only exist there.
_SETTINGS = (
    ("neon.timeline_id", NEON),
    ("rds.extensions", RDS),
    ("rds.logical_replication", RDS),
    ("cloudsql.logical_decoding", CLOUD_SQL),
    ("azure.extensions", AZURE),
)
_ROLES = (("supabase_admin", SUPABASE), ("neon_superuser", NEON), ("rds_superuser", RDS), ("cloudsqlsuperuser", CLOUD_SQL))


def provider_of(host: str, settings: Collection[str] = (), roles: Collection[str] = ()) -> Provider:
    """Who hosts this server, from its host name, its settings' and its roles' names; SELF when nobody known does."""
    name = host.rstrip(".").lower()
    for pattern, provider in _HOSTS:
        if re.search(pattern, name):
            return provider
    for setting, provider in _SETTINGS:
        if setting in settings:
            return provider
    for role, provider in _ROLES:
        if role in roles:
            return provider
    return SELF


def pooler_problem(host: str, port: int, username: str = "") -> str | None:
    """What to change when this address is surely a pooler's, in one sentence; None when it is not known to be one."""
    name = host.rstrip(".").lower()
    if name.endswith(".pooler.supabase.com") or (port == 6543 and re.search(r"\.supabase\.(co|com)$", name)):
        project = username.partition(".")[2] or (name.split(".")[1] if name.startswith("db.") else "")
        direct = f"db.{project}.supabase.co" if project else "db.<project>.supabase.co"
        user = username.partition(".")[0] if "." in username else ""
        return (
            f"this is Supabase's pooler, which cannot replicate: use the direct connection, host {direct}, port 5432"
            + (f", user {user}" if user else "")
            + " (it has an IPv6 address; without IPv6 here, turn on the project's IPv4 add-on)"
        )
    if re.search(r"-pooler\..*\.neon\.(tech|build)$", name):
        return f"this is Neon's pooler, which cannot replicate: use the direct connection, host {name.replace('-pooler.', '.', 1)}"
    if re.search(r"\.proxy-[a-z0-9]+\.[a-z0-9-]+\.rds\.amazonaws\.com$", name):
        return "this is an RDS Proxy, which cannot replicate: use the instance's or cluster's own endpoint"
    return None


def hint(error: str, host: str, port: int) -> str | None:
    """What to do about a connection error of libpq or a server, in one sentence; None when there is nothing to add."""
    text = error.lower()
    pooled = POOLER_PORTS.get(port)
    if re.search(r"unsupported startup parameter|tenant or user not found|pgbouncer|no such (user|database)\b", text) or (
        "prepared statement" in text and "does not exist" in text
    ):
        return "this looks like a pooler such as pgbouncer, which cannot replicate: use the direct connection to the server"
    if re.search(r"could not translate host name|name or service not known|network is unreachable|no address associated", text):
        if provider_of(host) is SUPABASE:
            return "Supabase's direct host has only an IPv6 address: this machine needs IPv6, or the project its IPv4 add-on"
        return "check the host's name, and whether this machine can reach it (an IPv6-only host needs IPv6 here)"
    if "no pg_hba.conf entry" in text:
        encrypted = "no encryption" in text or "ssl off" in text
        return (
            "the server wants an encrypted connection: set sslmode to require" if encrypted
            else "the server's pg_hba.conf does not admit this user from this address"
        )  # fmt: skip
    if "server does not support ssl" in text:
        return "the server has no SSL: turn it on there, or set sslmode to disable on a network you trust"
    if "certificate verify failed" in text or "root certificate" in text:
        return "put the certificate of the authority into ssl_root_cert"
    if re.search(r"replication role to start|permission denied to start wal sender|must be superuser or replication", text):
        return "the role may not replicate: " + provider_of(host).replication.format(role="<role>")
    if "max_wal_senders" in text:
        return "all of the server's WAL senders are taken: raise max_wal_senders, or end what uses them (SELECT * FROM pg_stat_replication)"
    if "too many clients" in text or "remaining connection slots" in text or "too many connections" in text:
        return "the server has no free connection: raise max_connections, or close some; it is tried again"
    if "connection refused" in text:
        return "nothing listens there: check host and port, and that the server runs" + (f" ({port} is {pooled})" if pooled else "")
    if "timeout expired" in text or "timed out" in text:
        return "nothing answers there: check host and port, and the firewall or the list of allowed addresses"
    return None


def version_name(version: int) -> str:
    """150018 → 15.18."""
    return f"{version // 10_000}.{version % 10_000}"


def setting_bytes(value: str, unit: str = "") -> int | None:
    """A memory setting such as `1GB`, or `1024` of unit MB, in bytes; None for -1, no limit."""
    units: Mapping[str, int] = {"": 1, "b": 1, "kb": 1 << 10, "8kb": 8 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
    match = re.fullmatch(r"(-?\d+)\s*([a-zA-Z]*)", value.strip())
    if match is None or int(match[1]) < 0:
        return None
    return int(match[1]) * units[(match[2] or unit).lower()]


def readable_bytes(size: float) -> str:
    """1234567 → 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
