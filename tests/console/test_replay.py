"""Delivering again from the console: what would come is shown first; what was done stands in the audit log."""
from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from consumers import changes
from consumers.audit import AuditEntry
from consumers.models import Backfill, Consumer
from consumers.store import claims
from tests.store.world import Log, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_rewind_says_first_how_many_come_again(console: Client, log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in (1, 2, 3, 4)])
    claims.ack(consumer, receipts(take(consumer)))
    url = f"/admin/consumers/consumer/{consumer}/rewind/"
    given = {"point": "row", "table": "public.orders", "key": "3", "occurrence": "first"}
    asked = console.post(url, given).content.decode()
    assert "Rewind and deliver 2 again" in asked and "the oldest message of the row 3 of public.orders" in asked
    assert take(consumer).messages == []
    console.post(url, {**given, "confirmed": "1"})
    assert [message.key for message in take(consumer).messages] == ['["3"]', '["4"]']
    entry = AuditEntry.objects.get(action="rewind")
    assert entry.actor == "user admin" and entry.count == 2
    assert '"table": "public.orders", "occurrence": "first"' in entry.detail and "3" not in entry.detail.partition("replay_id")[0], "the key is not kept"
    refused = console.post(url, {**given, "key": "99"}, follow=True).content.decode()
    assert "has no message of the row" in refused and "A backfill brings the rows as they are now" in refused
    for bad, sentence in (({"point": "time", "time": "soon"}, "Say a time"), ({"point": "lsn", "lsn": "x"}, "Expected an LSN"), ({}, "Choose a point")):
        assert sentence in console.post(url, bad, follow=True).content.decode()


def test_a_backfill_is_begun_watched_paused_and_cancelled(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, n int)")
    source_database.execute("INSERT INTO orders SELECT n, n FROM generate_series(1, 50) n")
    consumer = Consumer(name="filled", source=make_source(), kind="pull", tables=["public.orders"])
    changes.save(consumer)
    base = f"/admin/consumers/consumer/{consumer.pk}/"
    refused = console.post(f"{base}backfill/", {"table": "public.nothing"}, follow=True).content.decode()
    assert "is not one of the consumer&#x27;s tables" in refused
    assert "sort_column" in console.post(f"{base}backfill/", {"table": "public.orders", "sort_column": "zz"}, follow=True).content.decode()
    assert console.post(f"{base}backfill/", {"table": "public.orders"}).status_code == 302
    (backfill,) = Backfill.objects.filter(consumer=consumer.pk)
    for action, status in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        console.post(f"{base}backfills/{backfill.pk}/{action}/")
        backfill.refresh_from_db()
        assert backfill.status == status and status.capitalize() in console.get(f"{base}backfills/").content.decode()
    assert {"pause backfill", "resume backfill", "cancel backfill"} <= set(AuditEntry.objects.values_list("action", flat=True))
    assert "public.orders" in console.get(f"{base}?tab=replay").content.decode()


def test_a_republish_is_counted_and_shown_before_it_begins(console: Client, make_source: Any, source_database: Any) -> None:
    source_database.execute("CREATE TABLE orders (id int PRIMARY KEY, n int)")
    source_database.execute("INSERT INTO orders SELECT n, n FROM generate_series(1, 50) n")
    source = make_source()
    consumer = Consumer(name="again", source=source, kind="pull", tables=["public.orders"])
    changes.save(consumer)
    log = Log(source)
    log.lsn = 1 << 40
    log.append(*[log.row(key) for key in (1, 2, 3)])
    log.appender.close()
    claims.ack(consumer.pk, receipts(take(consumer.pk)))
    base = f"/admin/consumers/consumer/{consumer.pk}/"
    looked = console.post(f"{base}republish/look/", {"from": "log", "where": "id >= 2"}).content.decode()
    assert "<strong>2</strong>" in looked and "Deliver 2 once more" in looked and not Backfill.objects.exists()
    looked = console.post(f"{base}republish/look/", {"from": "table", "where": "n > 40"}).content.decode()
    assert "Deliver 10 once more" in looked or "Deliver about" in looked
    assert "where:" in console.post(f"{base}republish/look/", {"from": "log", "where": "nothing = 1"}).content.decode()
    assert "on its way" in console.post(f"{base}republish/", {"from": "log", "where": "id >= 2"}, follow=True).content.decode()
    (begun,) = Backfill.objects.filter(consumer=consumer.pk)
    assert begun.kind == "republish" and AuditEntry.objects.filter(action="republish", actor="user admin").exists()


def test_one_message_is_delivered_once_more(console: Client, log: Log) -> None:
    consumer = log.consumer()
    log.append(*[log.row(key) for key in (1, 2)])
    first = take(consumer)
    url = f"/admin/consumers/consumer/{consumer}/"
    assert "Deliver once more" not in console.get(f"{url}message/{first.messages[0].id}/").content.decode()
    claims.ack(consumer, receipts(first))
    assert "Deliver once more" in console.get(f"{url}message/{first.messages[0].id}/").content.decode()
    console.post(f"{url}redrive/republish/", {"id": first.messages[0].id})
    log.append(log.row(3))
    again = take(consumer).messages
    assert [message.key for message in again] == ['["1"]', '["3"]'] and again[0].commit_lsn == first.messages[0].commit_lsn
    assert again[0].replay_id is not None and again[1].replay_id is None
    assert AuditEntry.objects.get(action="republish").count == 1
    assert "The log has it no more" in console.post(f"{url}redrive/republish/", {"id": 10**15}, follow=True).content.decode()
