"""Tell what happened to a publication and its tables between two looks, as far as the stream does not say it. Pure.

The stream is silent about rows that came without being written: a table or partition that joins with rows in it, one that was left
out for a while, rows that an ALTER TABLE rewrote, partitions that were truncated, detached or dropped.
"""
from __future__ import annotations

from typing import Any, NamedTuple

ACTIONS = {"i": "inserts", "u": "updates", "d": "deletes", "t": "truncates"}


class Publication(NamedTuple):
    name: str
    oid: int
    version: str
    """Another one after every ALTER PUBLICATION of its options."""
    actions: str
    """Some of iudt."""
    via_root: bool


class Member(NamedTuple):
    """A table of the database, or a partition: where rows are in."""

    name: str
    membership: int | None
    """What makes it one of the publication's: the oid of that entry, 0 for all tables. None: it is not published."""
    filled: bool
    file: int
    """Another one after a rewrite or a truncation."""
    shape: str
    """Digest of its columns' names and types."""
    rewritten: str
    """Digest of what an ALTER TABLE of a column's values changes."""
    is_partition: bool


class Seen(NamedTuple):
    """What a look at the source found."""

    publication: Publication
    tables: dict[int, Member]

    def as_json(self) -> dict[str, Any]:
        return {"publication": list(self.publication), "tables": {str(oid): list(one) for oid, one in sorted(self.tables.items())}}

    def published(self) -> dict[int, Member]:
        return {oid: one for oid, one in self.tables.items() if one.membership is not None}


class Told(NamedTuple):
    """`backfill`: only a backfill brings what was not sent. `gap`: of which table is not known."""

    kind: str
    table: str | None
    text: str
    backfill: bool = False
    gap: bool = False


def from_json(found: dict[str, Any] | None) -> Seen | None:
    if found is None:
        return None
    return Seen(Publication(*found["publication"]), {int(oid): Member(*one) for oid, one in found["tables"].items()})


def happened(before: Seen | None, now: Seen) -> list[Told]:
    """What people should know, in this order: the publication, then its tables by oid."""
    if before is None:
        return []
    anew = before.publication.name != now.publication.name or before.publication.oid != now.publication.oid
    told = list(_of_publication(before.publication, now.publication))
    was = before.published()
    for oid, one in sorted(now.published().items()):
        told += _joined(before, one, oid) if oid not in was else _stayed(was[oid], one, now.publication, anew)
    for oid, one in sorted(was.items()):
        if oid not in now.published():
            told.append(_left(one, now.tables.get(oid), before.publication))
    return told


def _of_publication(before: Publication, now: Publication) -> list[Told]:
    if before.name != now.name:
        return [Told("publication", None, f"the publication {now.name} is read now, in place of {before.name}")]
    if before.oid != now.oid:
        return [Told("publication", None, "the publication was dropped and made anew: changes in between are missing", True, True)]
    told = []
    lost = [what for action, what in ACTIONS.items() if action in before.actions and action not in now.actions]
    back = [what for action, what in ACTIONS.items() if action not in before.actions and action in now.actions]
    if lost:
        told.append(Told("publication", None, f"the publication no longer sends {', '.join(lost)}"))
    if back:
        text = f"the publication sends {', '.join(back)} now; those from before are missing"
        told.append(Told("publication", None, text, backfill=True))
    if before.via_root != now.via_root:
        names = "the partitioned tables'" if now.via_root else "the partitions' own"
        told.append(Told("publication", None, f"changes of partitions arrive under {names} names now"))
    if not told and before.version != now.version:
        text = "the publication was altered; what it left out in between, if anything, is missing"
        told.append(Told("publication", None, text))
    return told


def _joined(before: Seen, one: Member, oid: int) -> list[Told]:
    text = "is published now"
    was = before.tables.get(oid)
    if was is not None and was.filled:
        return [Told("published", one.name, f"{text}; the rows it had before were not sent", backfill=True)]
    if was is None and one.filled and one.membership:  # made after the last look, and published by name
        return [Told("published", one.name, f"{text}; rows it had before, if any, were not sent", backfill=True)]
    return [Told("published", one.name, text)]


def _stayed(was: Member, one: Member, publication: Publication, anew: bool) -> list[Told]:
    told = []
    if was.name != one.name and not (one.is_partition and publication.via_root):
        text = f"was {was.name} until now: consumers that name that table get nothing more of it"
        told.append(Told("renamed", one.name, text))
    if was.membership != one.membership and not anew:
        text = "left the publication and came back, or its column list or row filter changed: what was not sent meanwhile is missing"
        told.append(Told("published", one.name, text, backfill=True))
    if was.file != one.file and was.shape == one.shape:
        if was.rewritten != one.rewritten:
            text = "its rows were rewritten (ALTER TABLE … USING, or the expression of a generated column) and not sent"
            told.append(Told("rewritten", one.name, text, backfill=True))
        elif was.filled and one.is_partition and publication.via_root and "t" in publication.actions:
            text = (
                "the partition was truncated, which the server does not send under publish_via_partition_root, or rewritten as it"
                " was (VACUUM FULL, CLUSTER)"
            )
            told.append(Told("truncated", one.name, text))
    return told


def _left(was: Member, one: Member | None, publication: Publication) -> Told:
    if one is None:
        text = "was dropped; no deletes were sent for the rows it had" if was.filled else "was dropped"
        return Told("unpublished", was.name, text)
    text = "is no longer published: its changes do not arrive"
    if was.is_partition and publication.via_root and one.filled:
        text += "; no deletes were sent for the rows it has"
    return Told("unpublished", one.name, text)
