"""A key is erased: its values, its key, what answers and errors said of it; everything else stays."""
from __future__ import annotations


import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from consumers.audit import AuditEntry
from consumers.store import claims, erasure, lifecycle
from consumers.store.types import Failure
from delivery.models import Arrival
from tests.store.world import Log, fetch, receipts, take

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_key_is_overwritten_everywhere_and_delivery_goes_on(log: Log) -> None:
    consumer = log.consumer()
    log.append(log.row(1), log.row(2), log.row(1), log.row(3, old_key=1), log.row(1))
    claim = take(consumer, 1)
    lifecycle.record_attempts(
        [lifecycle.Attempt(consumer, log.source.pk, claim.messages[0].id, False, 500, "no: personal", 1, "said: personal", "http://x", 1, '{"x-for": "personal"}')]
    )
    claims.fail(consumer, [Failure(claim.token, claim.messages[0].id, 1, "answered: personal", 500)])
    assert erasure.count(log.source.pk, "public.orders", '["1"]') == (4, 1, 1)
    assert erasure.count(log.source.pk, "public.others", '["1"]') == (0, 0, 0)
    assert erasure.erase(log.source.pk, "public.orders", '["1"]') == (4, 1, 1)
    assert erasure.count(log.source.pk, "public.orders", '["1"]') == (0, 0, 0)
    rows = fetch("SELECT key, old_key, record FROM messages ORDER BY id")
    assert [row[2] == "{}" for row in rows] == [True, False, True, True, True]
    assert rows[0][0].startswith('["erased-') and rows[3][0] == '["3"]' and rows[3][1] == rows[0][0] and rows[1][0] == '["2"]'
    everything = str(fetch("SELECT * FROM messages")) + str(fetch("SELECT * FROM attempts")) + str(fetch("SELECT last_error FROM parked"))
    assert "personal" not in everything
    # What is still to be delivered arrives, empty, each once.
    seen: list[int] = []
    while (claim := take(consumer)).token is not None or len(seen) < 5:
        seen += [message.id for message in claim.messages]
        claims.ack(consumer, receipts(claim))
    assert len(seen) == len(set(seen)) == 5


def test_the_console_counts_first_and_keeps_the_key_out_of_the_audit_log(log: Log) -> None:
    log.append(log.row(7), log.row(8))
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("admin", "", "password"))
    page, given = f"/admin/consumers/source/{log.source.pk}/erase/", {"table": "public.orders", "key": "7"}
    asked = client.post(page, given).content.decode()
    assert "Erase 1 message<" in asked and fetch("SELECT count(*) FROM messages WHERE record = '{}'") == [(0,)]
    shown = f'{{"metadata":{{"table_name":"%s","database":{{"id":"{log.source.pk}"}}}}}}'
    kept = [Arrival.objects.create(webhook_id="1", body=shown % table) for table in ("orders", "others")][1]
    client.post(page, {**given, "confirmed": "1"})
    assert list(Arrival.objects.all()) == [kept], "the playground's receiver forgets what it has shown of the table"
    assert fetch("SELECT count(*) FROM messages WHERE record = '{}'") == [(1,)]
    entry = AuditEntry.objects.get(action="erase")
    assert entry.count == 1 and "public.orders" in entry.detail and "7" not in entry.detail.replace(str(log.source.pk), "")
