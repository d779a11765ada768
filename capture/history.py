"""Decide where to go on reading when a connection comes about: is it the history that the log knows? Pure.

LSNs compare within one history only: a server's system identifier and timeline name it. After a failover, a restore or a
slot made anew the next changes get an epoch of their own, so that none is taken for one that is stored already, and what
may be missing is said. A copy of the server that was put back in its place has the same name and may have grown past our position:
there the proof tells, the newest stored transaction, which a server of the same history sends again (`proof_of`).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from capture.lsn import format_lsn, parse_lsn
from consumers.store.types import Progress, Proof


class Switch(NamedTuple):
    """Where a timeline ended and the next began."""

    timeline: int
    lsn: int


class Server(NamedTuple):
    """What the server says of itself and the slot."""

    system_identifier: str
    timeline: int
    wal_lsn: int
    """Up to here the server has written, or replayed when it is a standby."""
    in_recovery: bool
    confirmed_lsn: int
    """The slot sends nothing from before it."""
    ancestors: Sequence[Switch] = ()
    """The timelines that led to this one, oldest first. Needed only when the timeline is not the log's."""


class Decision(NamedTuple):
    """Go on from `progress`; a new epoch has begun when its number is not the one before."""

    progress: Progress
    gap: str | None = None
    """What may be missing from the log, or wrong in it; None when nothing is."""


def decide(before: Progress | None, server: Server, *, newest_lsn: int = 0, same_server: bool = False) -> Decision:
    """Where to go on, and what is to be said about it.

    `newest_lsn`: of the newest commit that the log has something of, 0 when there is nothing yet.
    `same_server`: all that is stored came from this very server, which was promoted while it was read.
    """
    if before is None:
        return Decision(_begin(1, server, server.confirmed_lsn))
    if before.system_identifier != server.system_identifier:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"another server answers (system {before.system_identifier} became {server.system_identifier}): what was changed"
            " between the two may be missing",
        )
    if before.timeline != server.timeline:
        return _after_failover(before, server, newest_lsn, same_server)
    if server.wal_lsn < max(before.reached_lsn, before.part_lsn) and not server.in_recovery:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"the server went back to {format_lsn(server.wal_lsn)}, although the log reaches {format_lsn(before.reached_lsn)}: it"
            " was restored from a backup. What the log has from after it may not exist there any more",
        )
    if server.confirmed_lsn > before.reached_lsn:
        return Decision(_begin(before.epoch + 1, server, server.confirmed_lsn), _missing(before.reached_lsn, server.confirmed_lsn))
    return Decision(before)


def proof_of(proof: Proof | None, server: Server, publication: str) -> Proof | None:
    """The proof to ask of the server: None when there is none, or the slot has heard of it already, which proves it too."""
    if proof is None or proof.publication != publication or server.confirmed_lsn > proof.lsn:
        return None
    return proof


def diverged(before: Progress, server: Server, proof: Proof) -> Decision:
    """The server did not send the proof again: its WAL is not the one that was read."""
    return Decision(
        _begin(before.epoch + 1, server, server.confirmed_lsn),
        f"the server does not have the transaction at {format_lsn(proof.lsn)} that the log has: it was put back from a copy, and what"
        f" the log has from after {format_lsn(server.confirmed_lsn)} may not exist there any more. Read again from there",
    )


def _after_failover(before: Progress, server: Server, newest_lsn: int, same_server: bool) -> Decision:
    change = f"timeline {before.timeline} became {server.timeline}"
    fork = next((one.lsn for one in server.ancestors if one.timeline == before.timeline), None)
    if fork is None and not same_server:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"the server's history is another one ({change}, which does not descend from it): changes may be missing",
        )
    # Beyond the fork the old timeline's WAL means nothing; before it, all that was reached is the same on both.
    start = before.reached_lsn if fork is None or same_server else min(before.reached_lsn, fork)
    gap = []
    if fork is not None and not same_server and newest_lsn >= fork:
        gap.append(
            f"failover to a server that was behind ({change} at {format_lsn(fork)}): what the log has between {format_lsn(fork)} and"
            f" {format_lsn(max(newest_lsn, before.reached_lsn))} may not exist there"
        )
    if server.confirmed_lsn > start:
        gap.append((f"{change}; " if not gap else "") + _missing(start, server.confirmed_lsn))
    if gap:
        return Decision(_begin(before.epoch + 1, server, max(start, server.confirmed_lsn)), "; ".join(gap))
    stored = min(before.stored_lsn, start)
    return Decision(before._replace(epoch=before.epoch + 1, timeline=server.timeline, stored_lsn=stored, reached_lsn=start))


def _begin(epoch: int, server: Server, lsn: int) -> Progress:
    return Progress(epoch, server.system_identifier, server.timeline, lsn, 0, 0, lsn)


def _missing(reached: int, confirmed: int) -> str:
    return (
        f"the slot begins at {format_lsn(confirmed)}, the log reaches only {format_lsn(reached)}: changes in between are missing; the"
        " slot was made anew, or somebody else read it"
    )


def parse_timeline_history(content: str) -> list[Switch]:
    """The lines of a timeline history file. Source: PostgreSQL's src/backend/access/transam/timeline.c."""
    found = []
    for line in content.splitlines():
        fields = line.split("#", 1)[0].split(None, 2)
        if len(fields) >= 2:
            found.append(Switch(int(fields[0]), parse_lsn(fields[1])))
    return found
