"""Decide where to go on reading when a connection comes about: is it the history that the log knows? Pure.

LSNs compare within one history only: a server's system identifier and timeline name it. After a failover, a restore or a
slot made anew the next changes get an epoch of their own, so that none is taken for one that is stored already, and what
may be missing is said.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from capture.lsn import format_lsn, parse_lsn
from consumers.store.types import Progress


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


def decide(before: Progress | None, server: Server) -> Decision:
    """Where to go on, and what is to be said about it."""
    if before is None:
        return Decision(_begin(1, server, server.confirmed_lsn))
    if before.system_identifier != server.system_identifier:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"another server answers (system {before.system_identifier} became {server.system_identifier}): what was changed"
            " between the two may be missing",
        )
    if before.timeline != server.timeline:
        return _after_failover(before, server)
    if server.wal_lsn < before.reached_lsn and not server.in_recovery:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"the server went back to {format_lsn(server.wal_lsn)}, although the log reaches {format_lsn(before.reached_lsn)}: it"
            " was restored from a backup. What the log has from after it may not exist there any more",
        )
    if server.confirmed_lsn > before.reached_lsn:
        return Decision(_begin(before.epoch + 1, server, server.confirmed_lsn), _missing(before.reached_lsn, server.confirmed_lsn))
    return Decision(before)


def _after_failover(before: Progress, server: Server) -> Decision:
    switch = next((one.lsn for one in server.ancestors if one.timeline == before.timeline), None)
    change = f"timeline {before.timeline} became {server.timeline}"
    if switch is None:
        return Decision(
            _begin(before.epoch + 1, server, server.confirmed_lsn),
            f"the server's history is another one ({change}, which does not descend from it): changes may be missing",
        )
    if before.reached_lsn <= switch:
        # All that is stored was before the fork: the new timeline goes on where the log ends.
        gap = None
        after = before._replace(epoch=before.epoch + 1, timeline=server.timeline)
        if server.confirmed_lsn > before.reached_lsn:
            gap = f"{change}; {_missing(before.reached_lsn, server.confirmed_lsn)}"
            after = _begin(before.epoch + 1, server, server.confirmed_lsn)
        return Decision(after, gap)
    gap = (
        f"failover to a server that was behind ({change} at {format_lsn(switch)}): what the log has between {format_lsn(switch)} and"
        f" {format_lsn(before.reached_lsn)} may not exist there"
    )
    if server.confirmed_lsn > switch:
        gap += f"; {_missing(switch, server.confirmed_lsn)}"
    return Decision(_begin(before.epoch + 1, server, max(switch, server.confirmed_lsn)), gap)


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
