"""Who may do what: viewers look, operators operate, admins configure; each deed stands in the audit log."""
from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import DatabaseError, connection, transaction
from django.test import Client

from consumers.audit import AuditEntry
from consumers.models import Consumer, HttpEndpoint
from consumers.store import claims, lifecycle
from consumers.store.types import Failure
from consumers.tokens import create_token
from tests.store.world import Log

pytestmark = pytest.mark.django_db(transaction=True)
ROLES = ("viewer", "operator", "admin")


def console(role: str) -> Client:
    user = User.objects.create_user(f"{role}-1", password="a long password", is_staff=True)
    user.groups.add(Group.objects.get(name=role))
    client = Client()
    client.force_login(user)
    return client


def entries(*columns: str) -> list[Any]:
    return list(AuditEntry.objects.order_by("id").values_list(*columns, flat=len(columns) == 1))


SEEN = {
    "": ROLES, "consumers/consumer/": ROLES, "consumers/consumer/{consumer}/": ROLES, "consumers/source/{source}/": ROLES,
    "consumers/message/": ROLES, "consumers/parked/": ROLES, "consumers/alertepisode/": ROLES, "consumers/httpendpoint/": ROLES,
    "consumers/auditentry/": ROLES[1:], "consumers/consumer/add/": ROLES[2:], "consumers/source/add/": ROLES[2:],
    "consumers/apitoken/": ROLES[2:], "auth/user/": ROLES[2:], "consumers/source/{source}/erase/": ROLES[2:],
    "consumers/httpendpoint/add/": ROLES[2:],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_each_role_sees_its_pages_and_no_others(log: Log, role: str) -> None:
    consumer, client = log.consumer(), console(role)
    for page, roles in SEEN.items():
        answer = client.get(f"/admin/{page.format(consumer=consumer, source=log.source.pk)}")
        assert answer.status_code == (200 if role in roles else 403), page


DONE = {
    "consumers/consumer/{consumer}/status/paused/": ROLES[1:], "consumers/consumer/{consumer}/redrive/retry/": ROLES[1:],
    "consumers/consumer/{consumer}/status/disabled/": ROLES[2:], "consumers/consumer/{consumer}/rewind/": ROLES[1:],
    "consumers/consumer/{consumer}/backfill/": ROLES[1:], "consumers/consumer/{consumer}/republish/": ROLES[1:], "consumers/source/{source}/do/resume/": (),
    "consumers/source/{source}/do/acknowledge_gap/": ROLES[1:], "consumers/source/try/": ROLES[2:],
    "consumers/httpendpoint/{endpoint}/new-secret/": ROLES[2:], "consumers/consumer/try-endpoint/": ROLES[2:],
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_each_role_does_its_own_and_nothing_by_a_link(log: Log, role: str) -> None:
    consumer, client = log.consumer(), console(role)
    endpoint = HttpEndpoint.objects.create(name="e", url="https://example.com/")
    for path, roles in DONE.items():
        url = f"/admin/{path.format(consumer=consumer, source=log.source.pk, endpoint=endpoint.pk)}"
        assert client.get(url).status_code in (405, 403), path
        if roles:
            answer = client.post(url)
            assert (answer.status_code == 403) == (role not in roles), path


def test_the_audit_log_says_who_what_and_how_many(log: Log) -> None:
    client, consumer = console("operator"), log.consumer(max_deliver=1)
    name = Consumer.objects.get(pk=consumer).name
    log.append(log.row(1), log.row(2))
    claim = claims.claim(consumer, 2, lease_ms=1000)
    claims.fail(consumer, [Failure(claim.token, m.id, 1, "answered 500", 500) for m in claim.messages])  # type: ignore[arg-type]
    base = f"/admin/consumers/consumer/{consumer}/"
    client.post(f"{base}status/paused/", REMOTE_ADDR="203.0.113.5")
    asked = client.post(f"{base}redrive/discard/", {"state": "dead"})
    assert "Discard 2 dead letters" in asked.content.decode() and lifecycle.backlog(consumer).dead == 2
    client.post(f"{base}redrive/discard/", {"state": "dead", "confirmed": "1"})
    assert lifecycle.backlog(consumer).dead == 0
    found = entries("actor", "action", "subject", "count")
    assert ("user operator-1", "paused", f"consumer {name}", None) in found
    assert ("user operator-1", "discard", f"consumer {name}", 2) in found
    assert AuditEntry.objects.get(action="paused").address == "203.0.113.5"


def test_api_tokens_and_fixtures_stand_in_it_too(log: Log, tmp_path: Any, client: Client) -> None:
    from django.core.management import call_command

    consumer = log.consumer()
    token = create_token("ci", "manage")[1]
    headers = {"HTTP_AUTHORIZATION": f"Bearer {token}"}
    assert client.post(f"/api/consumers/{consumer}/pause", **headers).status_code == 200
    client.post(f"/api/consumers/{consumer}/messages/discard", {"state": "parked"}, content_type="application/json", **headers)
    fixture = tmp_path / "f.json"
    fixture.write_text('[{"model": "consumers.httpendpoint", "fields": {"name": "hooks", "url": "https://example.com/", "secret_headers": {"a": "hush-hush"}}}]')
    call_command("loaddata", str(fixture))
    found = entries("actor", "action")
    assert ("token ci", "paused") in found and ("token ci", "discard") in found and ("command loaddata", "create") in found
    client.delete(f"/api/consumers/{consumer}?discard=true", **headers)
    assert ("token ci", "delete") in entries("actor", "action")
    assert "hush-hush" not in str(entries("detail"))


def test_changes_of_settings_are_told_without_secrets(log: Log) -> None:
    client = console("admin")
    endpoint = HttpEndpoint.objects.create(name="e", url="https://example.com/", signing_secret="whsec_" + "a" * 32)
    form = {"name": "e", "url": "https://example.org/", "headers": "{}", "secret_headers": '{"x": "hush-hush"}', "signing_secret": "", "timeout_ms": "30000"}
    client.post(f"/admin/consumers/httpendpoint/{endpoint.pk}/change/", form)
    (detail,) = [detail for action, detail in entries("action", "detail") if action == "change"]
    assert "https://example.org/" in detail and "hush-hush" not in detail and "********" in detail


def test_nobody_changes_the_audit_log(log: Log) -> None:
    client = console("admin")
    client.post(f"/admin/consumers/consumer/{log.consumer()}/status/paused/")
    assert AuditEntry.objects.exists()
    for statement in ("UPDATE consumers_auditentry SET actor = 'x'", "DELETE FROM consumers_auditentry"):
        with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(statement)
    entry = AuditEntry.objects.first()
    assert entry is not None
    assert client.get(f"/admin/consumers/auditentry/{entry.pk}/change/").status_code in (200, 403)
    assert client.post(f"/admin/consumers/auditentry/{entry.pk}/delete/", {"post": "yes"}).status_code == 403


def test_admins_do_not_make_themselves_superusers(log: Log) -> None:
    client = console("admin")
    boss = User.objects.create_superuser("boss", "", "a long password")
    assert client.post(f"/admin/auth/user/{boss.pk}/password/", {"password1": "taken over 1", "password2": "taken over 1"}).status_code == 403
    user = User.objects.create_user("new", password="a long password")
    client.post(f"/admin/auth/user/{user.pk}/change/", {"username": "new", "is_superuser": "on", "is_active": "on", "groups": [Group.objects.get(name="viewer").pk]})
    user.refresh_from_db()
    assert not user.is_superuser and user.is_staff and [group.name for group in user.groups.all()] == ["viewer"]


def test_roles_are_put_right_by_the_next_migration() -> None:
    from django.core.management import call_command

    Group.objects.get(name="viewer").permissions.clear()
    call_command("migrate", verbosity=0)
    assert Group.objects.get(name="viewer").permissions.filter(codename="view_consumer").exists()
    assert not Group.objects.get(name="viewer").permissions.filter(codename__startswith="operate").exists()
