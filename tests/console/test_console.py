"""The console's pages: they open, show no secret, and do what they say."""
from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from consumers.alert_models import AlertDestination
from consumers.models import ApiToken, Consumer, HttpEndpoint, Source
from consumers.store import claims, lifecycle
from consumers.store.models import Message
from consumers.store.types import Failure
from tests.store.world import Log

pytestmark = pytest.mark.django_db(transaction=True)

PAGES = [
    "", "consumers/source/", "consumers/source/add/", "consumers/httpendpoint/", "consumers/httpendpoint/add/", "consumers/consumer/",
    "consumers/consumer/add/", "consumers/apitoken/", "consumers/apitoken/add/", "consumers/message/", "consumers/parked/",
    "consumers/attempt/", "auth/user/", "auth/group/", "django_q/failure/", "consumers/auditentry/", "consumers/alertrule/",
    "consumers/alertdestination/", "consumers/alertdestination/add/", "consumers/alertepisode/", "auth/user/add/",
    "consumers/consumer/{consumer}/", "consumers/consumer/{consumer}/?tab=code", "consumers/consumer/{consumer}/change/", "consumers/consumer/{consumer}/?tab=replay", "consumers/consumer/{consumer}/?tab=rules",
    "consumers/consumer/{consumer}/?state=parked", "consumers/consumer/{consumer}/messages/?text=n&since=1h",
    "consumers/consumer/{consumer}/numbers/", "consumers/consumer/{consumer}/message/{message}/", "consumers/source/{source}/",
    "consumers/source/{source}/change/", "consumers/source/{source}/numbers/", "consumers/source/{source}/check/",
    "consumers/source/{source}/tables/", "consumers/source/{source}/erase/", "consumers/consumer/tables/?source={source}",
]  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens(console: Client, log: Log, page: str) -> None:
    canary = "whsec_" + "canary" * 6
    Source.objects.update(password=canary)
    HttpEndpoint.objects.create(name="e", url="https://example.com/", secret_headers={"authorization": canary}, signing_secret=canary)
    AlertDestination.objects.create(name="d", kind="slack", url=f"https://example.com/{canary}", signing_secret=canary)
    consumer = log.consumer()
    log.append(log.row(1), log.row(2))
    claim = claims.claim(consumer, 1, lease_ms=1000)
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered 500", 500)])  # type: ignore[arg-type]
    page = page.format(consumer=consumer, source=log.source.pk, message=claim.messages[0].id)
    answer = console.get(f"/admin/{page}")
    assert answer.status_code == 200
    assert "script-src 'self';" in answer["Content-Security-Policy"]
    assert canary not in answer.content.decode()


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


def test_connecting_says_what_is_wrong_and_keeps_the_password_to_itself(console: Client, free_port: int) -> None:
    url = f"postgresql://u:hush-hush@127.0.0.1:{free_port}/d"
    names = {"name": "shop", "slot_name": "sequin_slot", "publication_name": "sequin_pub"}
    for path in ("try", "add"):
        page = console.post(f"/admin/consumers/source/{path}/", {**names, "url": url}).content.decode()
        assert "cannot connect to 127.0.0.1" in page and "hush-hush" not in page
    page = console.post("/admin/consumers/source/try/", {**names, "url": "postgresql://u:hush-hush@db:5432,db2:1/d"}).content.decode()
    assert "Expected one port" in page and "hush-hush" not in page
    page = console.post("/admin/consumers/source/try/", {**names, "url": "nonsense://x:hush-hush@y"}).content.decode()
    assert "Expected postgresql://" in page and "hush-hush" not in page
    assert not Source.objects.exists()


def test_connecting_by_url_makes_slot_and_publication(console: Client, source_database: Any) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    db = source_database
    given = {
        "name": "shop", "url": f"postgresql://{db.user}:{db.password}@{db.host}:{db.port}/{db.name}", "slot_name": db.name[:60],
        "publication_name": "sequin_pub",
    }  # fmt: skip
    found = console.post("/admin/consumers/source/try/", given).content.decode()
    assert "is made on connecting" in found and "public.orders" in found and "Ready to connect" in found
    assert not Source.objects.exists()
    answer = console.post("/admin/consumers/source/add/", {**given, "tables": ["public.orders"]})
    source = Source.objects.get(name="shop")
    assert answer["HX-Redirect"] == f"/admin/consumers/source/{source.pk}/" and source.password == db.password
    assert source_database.execute("SELECT tablename FROM pg_publication_tables WHERE pubname = 'sequin_pub'") == [("orders",)]


def test_creating_consumers_of_both_kinds(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY)")
    source = make_source()
    common = {
        "source": str(source.pk), "tables": ["public.orders"], "actions": ["insert", "delete"], "stream": "changes", "start_from": "now",
        "batch_size": "1", "concurrency": "10", "ack_wait_ms": "30000", "max_ack_pending": "100", "on_full": "hold",
    }  # fmt: skip
    answer = console.post("/admin/consumers/consumer/add/", {**common, "name": "pulled", "kind": "pull"})
    pulled = Consumer.objects.get(name="pulled")
    assert answer["HX-Redirect"].endswith(f"{pulled.pk}/?tab=code") and pulled.actions == ["insert", "delete"]
    push = {**common, "name": "pushed", "kind": "push", "endpoint": "new", "endpoint_name": "hooks", "path": "/x"}
    page = console.post("/admin/consumers/consumer/add/", {**push, "endpoint_url": "ftp://example.com"}).content.decode()
    assert "expected http:// or https://" in page and not Consumer.objects.filter(name="pushed").exists()
    console.post(
        "/admin/consumers/consumer/add/",
        {**push, "endpoint_url": "https://example.com/hooks", "headers": "x-team: shop", "secret_headers": "authorization: Bearer hush-hush"},
    )
    pushed = Consumer.objects.get(name="pushed")
    assert pushed.endpoint.headers == {"x-team": "shop"} and pushed.endpoint.secret_headers == {"authorization": "Bearer hush-hush"}
    code = console.get(f"/admin/consumers/consumer/{pushed.pk}/?tab=code").content.decode()
    assert "/hooks/x" in code and "hush-hush" not in code
    # A refused consumer leaves no endpoint behind.
    bad = {**push, "name": "bad", "endpoint_name": "left", "endpoint_url": "https://example.com/", "max_per_group": "0"}
    assert "max_per_group" in console.post("/admin/consumers/consumer/add/", bad).content.decode().lower().replace(" ", "_")
    assert not HttpEndpoint.objects.filter(name="left").exists()


def test_disabling_asks_first_and_says_how_many(console: Client, log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2), log.row(3))
    chosen = {"action": "disable", "_selected_action": [str(consumer)]}
    page = console.post("/admin/consumers/consumer/", chosen)
    assert "Disabling drops 3 undelivered messages" in page.content.decode()
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
    page = console.post("/admin/consumers/parked/", {"action": "discard", "_selected_action": [second.pk]})
    assert "Discard 1 message?" in page.content.decode() and Parked.objects.filter(pk=second.pk).exists()
    console.post("/admin/consumers/parked/", {"action": "discard", "_selected_action": [second.pk], "confirmed": "1"})
    assert lifecycle.backlog(consumer) == (0, 0, 1, 0, 0, 0)
    gone = console.post(f"/admin/consumers/consumer/{consumer}/redrive/discard/", {"id": second.ids[0], "confirmed": "1"}, follow=True)
    assert "Nothing discarded: what was chosen is under way at this moment, or done already." in gone.content.decode()


def test_a_message_that_fails_while_it_is_looked_at_gets_its_buttons(console: Client, log: Log) -> None:
    consumer = log.consumer(max_deliver=1)
    log.append(log.row(1))
    claim = claims.claim(consumer, 1, lease_ms=60_000)
    page = f"/admin/consumers/consumer/{consumer}/message/{claim.messages[0].id}/"

    def fetched(path: str) -> str:
        return str(console.get(page + path).content.decode())

    opened = fetched("")
    assert 'history/?shown=out"' in opened and 'id="standing"' in opened and "Retry now" not in opened
    assert 'id="standing"' not in fetched("history/?shown=out")  # nothing new: a button that is being pressed stays
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered 500", 500)])  # type: ignore[arg-type]
    anew = fetched("history/?shown=out")
    assert 'history/?shown=dead"' in anew and 'id="standing" hx-swap-oob="true"' in anew and "Retry now" in anew
    assert 'id="standing"' not in fetched("history/?shown=dead")


def test_a_token_is_shown_once_and_can_be_revoked(console: Client) -> None:
    answer = console.post("/admin/consumers/apitoken/add/", {"name": "t", "scope": "pull"})
    assert "sqn_" in answer.content.decode() and "sqn_" not in str(answer.cookies) + str(dict(console.session))
    token = ApiToken.objects.get(name="t")
    html = console.get(f"/admin/consumers/apitoken/{token.pk}/change/").content.decode()
    assert token.token_hash not in html
    console.post("/admin/consumers/apitoken/", {"action": "revoke", "_selected_action": [str(token.pk)]})
    token.refresh_from_db()
    assert token.revoked_at is not None


def test_deleting_a_source_in_use_says_by_whom(console: Client, log: Log) -> None:
    log.consumer()
    answer = console.post(f"/admin/consumers/source/{log.source.pk}/delete/", {"post": "yes"}, follow=True)
    assert Source.objects.filter(pk=log.source.pk).exists() and "delete these first" in answer.content.decode()


def test_deleting_a_source_takes_its_slot_along_when_asked(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    source = make_source()
    url = f"/admin/consumers/source/{source.pk}/delete/"
    assert source.slot_name in console.get(url).content.decode() and Source.objects.exists()
    console.post(url, {"drop": "1"})
    assert not Source.objects.exists()
    assert source_database.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name]) == [(0,)]


def test_check_events_and_recover_in_the_console(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE t (a int)")
    source_database.execute("CREATE PUBLICATION sequin_pub FOR TABLE t")
    source = make_source()
    page = f"/admin/consumers/source/{source.pk}/"
    shown = console.get(f"{page}check/").content.decode()
    assert "UPDATEs and DELETEs fail while it is published" in shown and "REPLICA IDENTITY FULL" in shown and "findings are good" in shown
    from consumers.store.appender import Appender

    with Appender(source.pk) as appender:
        appender.note("type", "public.t", "the type of <b>a</b> became text", backfill=True)
    assert "the type of &lt;b&gt;a&lt;/b&gt; became text" in console.get(page).content.decode()
    source_database.execute("SELECT pg_drop_replication_slot(%s)", [source.slot_name])
    asked = console.post(f"{page}do/recover/")
    assert "is not captured: it is shown as a gap" in asked.content.decode()
    answer = console.post(f"{page}do/recover/", {"confirmed": "1"}, follow=True)
    assert "capture begins again" in answer.content.decode()
    assert source_database.execute("SELECT count(*) FROM pg_replication_slots WHERE slot_name = %s", [source.slot_name]) == [(1,)]


def test_the_system_checks_pass() -> None:
    """Every command runs them; an admin class that shadows one of Django's methods fails there."""
    from django.core.management import call_command

    call_command("check")


def test_filter_and_transform_are_tried_on_real_messages_before_they_are_saved(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, n int)")
    source = make_source()
    consumer = Consumer(name="tried", source=source, kind="pull", tables=["public.orders"])
    from consumers import changes

    changes.save(consumer)
    log = Log(source)
    log.lsn = 1 << 40  # beyond where the source really is
    log.append(log.row(1), log.row(2), log.row(3))
    log.appender.close()
    base = f"/admin/consumers/consumer/{consumer.pk}/"
    rules = {"where": "id >= 2", "transform": "function transform(action, record) return {only = record.id} end"}
    shown = console.post(f"{base}try/", rules).content.decode()
    assert "Of the newest 3 messages, 2 would be delivered" in shown and "Filtered out" in shown and "&quot;only&quot;: 3" in shown
    refused = console.post(f"{base}rules/", {**rules, "where": "idd >= 2"}).content.decode()
    assert "Filter:" in refused and "idd" in refused and Consumer.objects.get(pk=consumer.pk).where == ""
    assert "line 1" in console.post(f"{base}try/", {**rules, "transform": "function transform( return 1 end"}).content.decode()
    assert "HX-Redirect" in console.post(f"{base}rules/", rules)
    assert Consumer.objects.get(pk=consumer.pk).where == "id >= 2"
    # What it leaves out can be looked at, and the message says why it did not come.
    while claims.claim(consumer.pk, 10, lease_ms=1000).token is not None:
        pass
    listed = console.get(f"{base}?state=filtered").content.decode()
    number = Message.objects.order_by("id")[0].pk
    first, second = f"{base}message/{number}/", f"{base}message/{number + 1}/"
    assert first in listed and second not in listed and "by the filter as it is now, <code>id &gt;= 2</code>" in listed
    page = console.get(first).content.decode()
    assert "Not delivered: the filter, as it is now, says no" in page
    assert "&quot;only&quot;: 2" in console.get(second).content.decode()
