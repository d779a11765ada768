"""What the watcher of the clusters hears, on the real store."""
from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from django.db import connection

from consumers.store import turns
from delivery.cluster import MOST_GRACE_S, START_GRACE_S, Cluster, Notices
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def notices() -> Iterator[Notices]:
    made = Notices()
    made.listen()
    yield made
    made.close()


def test_a_pump_counts_for_its_slot_until_it_is_gone_and_for_the_shares_until_it_ends() -> None:
    cluster = str(uuid4())
    turns.join(cluster)
    assert (turns.alive_pumps(cluster), turns.shares()[1]) == (1, 1)
    turns.retire(cluster)
    assert (turns.alive_pumps(cluster), turns.shares()[1]) == (1, 0)
    turns.beat(cluster, ending=True)
    assert (turns.alive_pumps(cluster), turns.shares()[1]) == (1, 0)
    turns.forget_pump()
    assert (turns.alive_pumps(cluster), turns.shares()[1]) == (0, 0)


def test_the_watcher_hears_at_once_when_a_pump_is_gone(notices: Notices) -> None:
    turns.forget_pump()
    assert notices.wait(60)
    assert not notices.wait(0)


def test_it_listens_again_when_the_store_has_been_away(notices: Notices) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sequin watcher'")

    def hears() -> bool:
        notices.listen()
        turns.forget_pump()
        return notices.wait(0.1)

    wait_until(hears, 10, "the notice")


def test_a_cluster_that_was_replaced_in_vain_has_longer_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "_restart", lambda self: None)  # which would start one
    cluster = Cluster()
    graces = [cluster.due_at]
    for _ in range(5):
        cluster.replace()
        graces.append(cluster.due_at)
    assert graces == [START_GRACE_S * times for times in (1, 2, 4, 8)] + [MOST_GRACE_S] * 2
    cluster.works()
    assert cluster.due_at == START_GRACE_S
