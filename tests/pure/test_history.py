"""Where capture goes on after a restart, a failover, a restore or a slot made anew."""
from __future__ import annotations

import pytest

from capture.history import Decision, Server, Switch, decide, diverged, parse_timeline_history, proof_of
from consumers.store.types import Progress, Proof

STORED = Progress(3, "system-a", 2, 900, 950, 7, 1000)


def server(system: str = "system-a", timeline: int = 2, wal: int = 5000, recovering: bool = False, confirmed: int = 1000,
           ancestors: tuple[Switch, ...] = ()) -> Server:  # fmt: skip
    return Server(system, timeline, wal, recovering, confirmed, ancestors)


def test_the_first_start_begins_where_the_slot_does() -> None:
    assert decide(None, server(confirmed=77)) == Decision(Progress(1, "system-a", 2, 77, 0, 0, 77))


@pytest.mark.parametrize("confirmed", [0, 500, 1000])
def test_the_same_history_goes_on_where_the_log_ends(confirmed: int) -> None:
    assert decide(STORED, server(confirmed=confirmed)) == Decision(STORED)


def test_a_slot_ahead_of_the_log_is_a_gap_and_an_epoch() -> None:
    progress, gap = decide(STORED, server(confirmed=1001))
    assert progress == Progress(4, "system-a", 2, 1001, 0, 0, 1001) and gap is not None and "are missing" in gap


def test_another_system_is_a_gap_and_an_epoch_although_its_lsns_fit() -> None:
    progress, gap = decide(STORED, server(system="system-b", confirmed=10))
    assert progress == Progress(4, "system-b", 2, 10, 0, 0, 10) and gap is not None and "another server" in gap


def test_a_server_that_went_back_is_a_gap_but_a_standby_that_lags_is_not() -> None:
    progress, gap = decide(STORED, server(wal=999, confirmed=800))
    assert progress.epoch == 4 and progress.reached_lsn == 800 and gap is not None and "restored from a backup" in gap
    assert decide(STORED, server(wal=999, confirmed=800, recovering=True)) == Decision(STORED)


def test_failover_to_a_server_that_had_everything_loses_and_doubles_nothing() -> None:
    progress, gap = decide(STORED, server(timeline=3, confirmed=800, ancestors=(Switch(1, 100), Switch(2, 1200))), newest_lsn=950)
    assert gap is None
    assert progress == STORED._replace(epoch=4, timeline=3), "what is stored stays recognised, the rest gets a new epoch"


def test_failover_to_a_server_that_lacks_only_what_had_nothing_for_us_is_no_gap() -> None:
    progress, gap = decide(STORED, server(timeline=3, confirmed=800, ancestors=(Switch(2, 980),)), newest_lsn=950)
    assert gap is None and progress == STORED._replace(epoch=4, timeline=3, reached_lsn=980)


def test_failover_to_a_server_that_was_behind_is_said_and_reads_from_the_fork() -> None:
    progress, gap = decide(STORED, server(timeline=3, confirmed=700, ancestors=(Switch(2, 940),)), newest_lsn=950)
    assert progress == Progress(4, "system-a", 3, 940, 0, 0, 940)
    assert gap is not None and "may not exist there" in gap and "missing" not in gap


def test_failover_to_a_server_without_the_transaction_that_is_half_stored_is_said() -> None:
    half = Progress(3, "system-a", 2, 900, 1100, 7, 1000)
    progress, gap = decide(half, server(timeline=3, confirmed=700, ancestors=(Switch(2, 1050),)), newest_lsn=1100)
    assert progress == Progress(4, "system-a", 3, 1000, 0, 0, 1000) and gap is not None and "may not exist there" in gap
    progress, gap = decide(half, server(timeline=3, confirmed=700, ancestors=(Switch(2, 1200),)), newest_lsn=1100)
    assert progress == half._replace(epoch=4, timeline=3) and gap is None


def test_failover_with_a_slot_made_anew_is_a_gap() -> None:
    progress, gap = decide(STORED, server(timeline=3, confirmed=1500, ancestors=(Switch(2, 1200),)), newest_lsn=950)
    assert progress.reached_lsn == 1500 and progress.epoch == 4 and gap is not None and "are missing" in gap
    progress, gap = decide(STORED, server(timeline=3, confirmed=1500, ancestors=(Switch(2, 940),)), newest_lsn=950)
    assert progress.reached_lsn == 1500 and gap is not None and "may not exist" in gap and "are missing" in gap


def test_a_standby_promoted_while_it_was_read_is_no_gap() -> None:
    promoted = server(timeline=3, confirmed=900, ancestors=(Switch(2, 940),))
    progress, gap = decide(STORED, promoted, newest_lsn=950, same_server=True)
    assert progress == STORED._replace(epoch=4, timeline=3) and gap is None


def test_a_proof_is_asked_for_unless_the_slot_has_heard_of_it() -> None:
    proof = Proof(950, 77, 123, "sequin_pub")
    assert proof_of(proof, server(confirmed=950), "sequin_pub") == proof
    assert proof_of(proof, server(confirmed=951), "sequin_pub") is None
    assert proof_of(proof, server(confirmed=900), "another") is None and proof_of(None, server(), "sequin_pub") is None
    progress, gap = diverged(STORED, server(confirmed=900), proof)
    assert progress == Progress(4, "system-a", 2, 900, 0, 0, 900) and gap is not None and "put back from a copy" in gap


def test_a_server_that_went_back_behind_a_half_stored_transaction_is_a_gap() -> None:
    half = Progress(3, "system-a", 2, 900, 1100, 7, 1000)
    assert decide(half, server(wal=1050, confirmed=800))[1] is not None


def test_a_timeline_that_does_not_descend_from_ours_is_a_gap() -> None:
    progress, gap = decide(STORED, server(timeline=3, confirmed=800, ancestors=(Switch(1, 100),)))
    assert progress.epoch == 4 and progress.reached_lsn == 800 and gap is not None and "does not descend" in gap


def test_a_timeline_history_file() -> None:
    text = "1\t0/16B3748\tno recovery target specified\n\n2\t1A/16B3800\tbefore 2026-01-01 # note\n# comment\n"
    assert parse_timeline_history(text) == [Switch(1, 0x16B3748), Switch(2, 0x1A016B3800)]
