"""The console's pages: they open, show no secret, and do what they say."""
from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from consumers.models import ApiToken, Consumer, HttpEndpoint, Source
from consumers.store import claims, lifecycle
from consumers.store.types import Failure
from tests.store.test_claims import Log

pytestmark = pytest.mark.django_db(transaction=True)

PAGES = [
    "", "consumers/source/", "consumers/source/add/", "consumers/httpendpoint/", "consumers/httpendpoint/add/", "consumers/consumer/",
    "consumers/consumer/add/", "consumers/apitoken/", "consumers/apitoken/add/", "consumers/message/", "consumers/parked/",
    "consumers/attempt/", "auth/user/", "auth/group/", "django_q/failure/",
]  # fmt: skip


@pytest.fixture
def log() -> Any:
    made = Log()
    yield made
    made.appender.close()


@pytest.fixture
def console() -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "", "password"))
    return client


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens(console: Client, log: Log, page: str) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    claim = claims.claim(consumer, 1, lease_ms=1000)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered 500", 500)])  # type: ignore[arg-type]
    assert console.get(f"/admin/{page}").status_code == 200


def test_nobody_gets_in_without_a_login() -> None:
    assert Client().get("/admin/consumers/source/").status_code == 302


def test_no_secret_is_shown(console: Client) -> None:
    source = Source.objects.create(name="s", host="localhost", database="d", username="u", password="hush-hush", status="paused")
    endpoint = HttpEndpoint.objects.create(name="e", url="https://example.com/", secret_headers={"authorization": "hush-hush"})
    for thing, page in ((source, "source"), (endpoint, "httpendpoint")):
        html = console.get(f"/admin/consumers/{page}/{thing.pk}/change/").content.decode()
        assert "hush-hush" not in html and endpoint.signing_secret not in html


def test_an_empty_secret_keeps_the_saved_one(console: Client) -> None:
    endpoint = HttpEndpoint.objects.create(name="e", url="https://example.com/", secret_headers={"x-key": "hush"})
    secret = endpoint.signing_secret
    form = {"name": "e2", "url": "https://example.com/", "headers": "{}", "secret_headers": "", "signing_secret": "", "timeout_ms": "1000"}
    assert console.post(f"/admin/consumers/httpendpoint/{endpoint.pk}/change/", form).status_code == 302
    endpoint.refresh_from_db()
    assert (endpoint.name, endpoint.secret_headers, endpoint.signing_secret) == ("e2", {"x-key": "hush"}, secret)


def test_a_source_that_does_not_answer_is_said_at_its_field(console: Client, free_port: int) -> None:
    form = {
        "name": "shop", "host": "127.0.0.1", "port": str(free_port), "database": "d", "username": "u", "password": "hush-hush",
        "sslmode": "", "ssl_root_cert": "", "slot_name": "sequin_slot", "publication_name": "sequin_pub", "status": "active",
    }  # fmt: skip
    page = console.post("/admin/consumers/source/add/", form)
    assert page.status_code == 200 and "cannot connect to 127.0.0.1" in page.content.decode()
    assert "hush-hush" not in page.content.decode() and not Source.objects.exists()


def test_disabling_asks_first_and_says_how_many(console: Client, log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2), log.row(3))
    chosen = {"action": "disable", "_selected_action": [str(consumer)]}
    page = console.post("/admin/consumers/consumer/", chosen)
    assert "<b>3</b> undelivered messages" in page.content.decode()
    assert Consumer.objects.get(pk=consumer).status == "active"
    console.post("/admin/consumers/consumer/", {**chosen, "confirmed": "1"})
    assert Consumer.objects.get(pk=consumer).status == "disabled"


def test_pause_and_resume(console: Client, log: Log) -> None:
    consumer = log.consumer()
    for action, status in (("pause", "paused"), ("resume", "active")):
        console.post("/admin/consumers/consumer/", {"action": action, "_selected_action": [str(consumer)]})
        assert Consumer.objects.get(pk=consumer).status == status


def test_dead_letters_are_tried_again_or_dropped(console: Client, log: Log) -> None:
    consumer = log.consumer(max_deliver=1)
    log.append(log.row(1), log.row(2))
    claim = claims.claim(consumer, 2, lease_ms=1000)
    claims.fail(consumer, [Failure(claim.token, m.id, 1, "answered 500", 500) for m in claim.messages])  # type: ignore[arg-type]
    from consumers.store.models import Parked

    first, second = Parked.objects.filter(consumer=consumer)
    console.post("/admin/consumers/parked/", {"action": "retry", "_selected_action": [first.pk]})
    console.post("/admin/consumers/parked/", {"action": "discard", "_selected_action": [second.pk]})
    assert lifecycle.backlog(consumer) == (0, 0, 1, 0, 0, 0)


def test_a_token_is_shown_once_and_can_be_revoked(console: Client) -> None:
    page = console.post("/admin/consumers/apitoken/add/", {"name": "t", "scope": "pull"}, follow=True).content.decode()
    assert "sqn_" in page
    token = ApiToken.objects.get(name="t")
    html = console.get(f"/admin/consumers/apitoken/{token.pk}/change/").content.decode()
    assert token.token_hash not in html
    console.post("/admin/consumers/apitoken/", {"action": "revoke", "_selected_action": [str(token.pk)]})
    token.refresh_from_db()
    assert token.revoked_at is not None


def test_deleting_a_source_in_use_says_by_whom(console: Client, log: Log) -> None:
    log.consumer()
    answer = console.post(f"/admin/consumers/source/{log.source.pk}/delete/", {"post": "yes"}, follow=True)
    assert Source.objects.filter(pk=log.source.pk).exists() and answer.status_code == 200


def test_check_events_and_recover_in_the_console(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE t (a int)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    page = f"/admin/consumers/source/{source.pk}/change/"
    shown = console.get(f"/admin/consumers/source/{source.pk}/check", follow=True).content.decode()
    assert "has no replica identity" in shown and "REPLICA IDENTITY FULL" in shown and "findings are good" in shown
    from consumers.store.appender import Appender

    with Appender(source.pk) as appender:
        appender.note("type", "public.t", "the type of <b>a</b> became text", backfill=True)
    assert "the type of &lt;b&gt;a&lt;/b&gt; became text → backfill" in console.get(page).content.decode()
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    answer = console.post("/admin/consumers/source/", {"action": "recover", "_selected_action": [str(source.pk)]}, follow=True)
    assert "capture begins again" in answer.content.decode()
    assert source_database.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name]) == [(1,)]


def test_the_system_checks_pass() -> None:
    """Every command runs them; an admin class that shadows one of Django's methods fails there."""
    from django.core.management import call_command

    call_command("check")
