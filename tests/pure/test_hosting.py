"""Hosters and poolers are recognised, and errors get a sentence that says what to do."""
from __future__ import annotations

import pytest

from consumers import hosting

PROJECT = "abcdefghijklmnop"


@pytest.mark.parametrize(
    ("host", "settings", "roles", "name"),
    [
        (f"db.{PROJECT}.supabase.co", (), (), "Supabase"),
        ("aws-0-eu-central-1.pooler.supabase.com", (), (), "Supabase"),
        ("EP-Cool-Dust-1.eu-central-1.aws.NEON.tech", (), (), "Neon"),
        ("shop.abc.eu-west-1.rds.amazonaws.com", (), (), "Amazon RDS"),
        ("shop.postgres.database.azure.com", (), (), "Azure Database for PostgreSQL"),
        ("10.1.2.3", ("wal_level", "cloudsql.logical_decoding"), (), "Google Cloud SQL"),
        ("10.1.2.3", ("rds.logical_replication",), (), "Amazon RDS"),
        ("10.1.2.3", ("neon.timeline_id",), (), "Neon"),
        ("10.1.2.3", (), ("postgres", "supabase_admin"), "Supabase"),
        ("10.1.2.3", ("wal_level",), ("postgres",), ""),
        ("notsupabase.com", (), (), ""),
    ],
)
def test_providers(host: str, settings: tuple[str, ...], roles: tuple[str, ...], name: str) -> None:
    assert hosting.provider_of(host, settings, roles).name == name


@pytest.mark.parametrize(
    ("host", "port", "user", "says"),
    [
        ("aws-0-eu-central-1.pooler.supabase.com", 6543, f"postgres.{PROJECT}", f"db.{PROJECT}.supabase.co"),
        ("aws-0-eu-central-1.pooler.supabase.com", 5432, f"postgres.{PROJECT}", "user postgres"),
        ("aws-0-eu-central-1.pooler.supabase.com.", 5432, "", "db.<project>.supabase.co"),
        (f"db.{PROJECT}.supabase.co", 6543, "postgres", f"host db.{PROJECT}.supabase.co, port 5432"),
        ("ep-cool-dust-1-pooler.eu-central-1.aws.neon.tech", 5432, "", "ep-cool-dust-1.eu-central-1.aws.neon.tech"),
        ("shop.proxy-abc123.eu-west-1.rds.amazonaws.com", 5432, "", "own endpoint"),
    ],
)
def test_poolers_are_refused_with_the_address_to_use(host: str, port: int, user: str, says: str) -> None:
    problem = hosting.pooler_problem(host, port, user)
    assert problem is not None and says in problem and "cannot replicate" in problem


@pytest.mark.parametrize(
    ("host", "port"),
    [(f"db.{PROJECT}.supabase.co", 5432), ("ep-x.aws.neon.tech", 5432), ("localhost", 6543), ("pooler.example.com", 5432)],
)
def test_direct_addresses_are_not(host: str, port: int) -> None:
    assert hosting.pooler_problem(host, port, "postgres") is None


@pytest.mark.parametrize(
    ("error", "host", "says"),
    [
        ("FATAL: unsupported startup parameter: replication", "10.0.0.1", "direct connection"),
        ("FATAL: unsupported startup parameter in options: TimeZone", "10.0.0.1", "pooler"),
        ("FATAL: Tenant or user not found", "10.0.0.1", "pooler"),
        ('could not translate host name "db.x.supabase.co" to address', "db.x.supabase.co", "IPv6"),
        ("Network is unreachable", "10.0.0.1", "IPv6"),
        ('no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", no encryption', "h", "sslmode to require"),
        ('no pg_hba.conf entry for host "1.2.3.4", user "u", database "d", SSL encryption', "h", "does not admit"),
        ("server does not support SSL, but SSL was required", "h", "sslmode"),
        ("SSL error: certificate verify failed", "h", "ssl_root_cert"),
        ("must be superuser or replication role to start walsender", "h", "ALTER ROLE"),
        ("permission denied to start WAL sender", "x.rds.amazonaws.com", "rds_replication"),
        ("number of requested standby connections exceeds max_wal_senders (currently 1)", "h", "max_wal_senders"),
        ("sorry, too many clients already", "h", "max_connections"),
        ("Connection refused", "h", "nothing listens"),
        ("timeout expired", "h", "firewall"),
    ],
)
def test_errors_get_a_sentence(error: str, host: str, says: str) -> None:
    said = hosting.hint(error, host, 5432)
    assert said is not None and says in said


def test_an_error_that_says_it_all_gets_none() -> None:
    assert hosting.hint('password authentication failed for user "u"', "h", 5432) is None


def test_sizes() -> None:
    assert hosting.setting_bytes("-1", "MB") is None
    assert hosting.setting_bytes("1024", "MB") == 1 << 30 and hosting.setting_bytes("2GB") == 2 << 30
    assert hosting.readable_bytes(999) == "999 bytes" and hosting.readable_bytes(1_234_567) == "1.2 MB"
