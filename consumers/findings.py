"""What a pre-flight says, a finding, and what its checks know of the server. `preflight` and `preflight_tables` make findings."""
from __future__ import annotations

from typing import Any, NamedTuple

import psycopg

from consumers import hosting
from consumers.hosting import Provider
from consumers.models import Source


class Finding(NamedTuple):
    """One thing the pre-flight saw. `sql` mends it; a blocking one stops capture."""

    name: str
    ok: bool
    blocking: bool
    text: str
    sql: str = ""


class Server(NamedTuple):
    """What the checks need to know of the server, read once."""

    version: int
    provider: Provider
    settings: dict[str, tuple[str, str]]
    in_recovery: bool

    def setting(self, name: str) -> str | None:
        found = self.settings.get(name)
        return None if found is None else found[0]

    def setting_bytes(self, name: str) -> int | None:
        found = self.settings.get(name)
        return None if found is None else hosting.setting_bytes(*found)


def read_server(conn: psycopg.Connection[Any], source: Source) -> Server:
    rows = conn.execute("SELECT name, setting, coalesce(unit, '') FROM pg_settings").fetchall()
    settings = {name: (value, unit) for name, value, unit in rows}
    roles = {row[0] for row in conn.execute("SELECT rolname::text FROM pg_roles").fetchall()}
    recovering = bool(one(conn, "SELECT pg_is_in_recovery()"))
    return Server(conn.info.server_version, hosting.provider_of(source.host, settings, roles), settings, recovering)


def one(conn: psycopg.Connection[Any], query: str, parameters: list[Any] | None = None) -> Any:
    row = conn.execute(query, parameters).fetchone()
    return None if row is None else row[0]
