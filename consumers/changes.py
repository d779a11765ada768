"""Create, change and delete what is configured: the one path of admin, API and loaddata, with the same effects.

A source that is saved gets its publication and slot; a consumer gets its tables published and its position in the log.
Everything that can fail is done before or inside the transaction that saves, so nothing half made is left.
"""
from __future__ import annotations

from typing import Any, TypeVar
from uuid import uuid4

import psycopg
from django.core.exceptions import ValidationError
from django.db import transaction

from consumers import audit
from consumers.backfill_rules import inspect, look_at_beginning, tables_to_backfill
from consumers.fields import MASK
from consumers.models import Backfill, Consumer, HttpEndpoint, Source, groups_in_use
from consumers.publishing import as_validation, demand_publication, publish_tables
from consumers.routing import check_groups, check_where
from consumers.source_connection import SourceUnreachable, reason_of
from consumers.source_setup import (
    Prepared,
    SetupRefused,
    drop_slot,
    prepare_source,
    renew_slot,
    source_position,
)
from consumers.store import backfills, lifecycle

SECRET_FIELDS = ("password", "secret_headers", "signing_secret")
UNTOLD_FIELDS = ("id", "created_at", "updated_at", "status_reason", "slot_created", "publication_created")
REACHED_BY = ("host", "port", "database", "username", "password", "sslmode", "ssl_root_cert", "slot_name", "publication_name")


Thing = TypeVar("Thing", Source, HttpEndpoint, Consumer)


class InUse(Exception):
    """Refused because others depend on it. The text says who, and what to do."""


def save(thing: Source | HttpEndpoint | Consumer | Backfill, prepared: Prepared | None = None) -> None:
    """Validate and save, with all effects. Raises ValidationError, with nothing changed.

    `prepared`: what `prepare` answered for this source, when that was done before.
    """
    thing.full_clean()
    if isinstance(thing, Source):
        _save_source(thing, prepared)
    elif isinstance(thing, Consumer):
        _save_consumer(thing)
    elif isinstance(thing, Backfill):
        _begin_backfill(thing)
    else:
        with transaction.atomic():
            _record(thing, _current(thing))
            thing.save()


def delete(thing: Source | HttpEndpoint | Consumer, *, discard: bool = False, drop_replication: bool = False) -> None:
    """Delete, or raise InUse. `discard`: a consumer may go with what it has not delivered.

    `drop_replication`: a source takes its slot and publication along, where we made them.
    """
    if isinstance(thing, Consumer):
        _delete_consumer(thing, discard)
        return
    users = list(thing.consumers.order_by("name").values_list("name", flat=True))
    if users:
        raise InUse(f"{thing.name} is used by {_listed(users)}: delete these first")
    if isinstance(thing, Source):
        if drop_replication:
            try:
                drop_slot(thing)
            except (SourceUnreachable, psycopg.Error) as error:
                raise InUse(f"its slot could not be dropped: {error}. Delete the source without it, and later the slot") from None
        with transaction.atomic():
            audit.record("delete", thing, drop_replication=drop_replication)
            lifecycle.drop_source(thing.pk)
            thing.delete()
    else:
        with transaction.atomic():
            audit.record("delete", thing)
            thing.delete()


def rehearse(thing: Source | HttpEndpoint | Consumer) -> Prepared | None:
    """Do what can fail elsewhere before saving, so that a form can show it: `save` takes the answer. Raises ValidationError."""
    if isinstance(thing, Source):
        return prepare(thing)
    if isinstance(thing, Consumer):
        thing.notices = [*check_where(thing), *check_groups(thing)]
        if thing.read_as is None or thing.read_as["tables"] != thing.tables:
            _publish(thing)
        if thing._state.adding:
            _position(thing.source)
    return None


def prepare(source: Source) -> Prepared | None:
    """Make the slot and publication of a source that is new or moved; None when there is nothing to do.

    Not inside a transaction that has written to the store, where the source may share its server: making a slot waits for
    that transaction. Raises ValidationError.
    """
    if source.status != "active" or _is_where_it_was(source):
        return None
    try:
        return prepare_source(source)
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "host") from None
    except psycopg.Error as error:
        raise ValidationError({"host": " ".join(str(error).split())}) from None


def recover(source: Source) -> None:
    """Let capture begin again after its slot was lost or dropped, or its publication: made anew where they were ours.

    What was missed in between shows as a gap. Raises ValidationError.
    """
    tables = sorted({table for consumer in source.consumers.all() for table in consumer.tables})
    try:
        demand_publication(source, tables)
        renew_slot(source, unreadable=lifecycle.source_state(source.pk) == "slot_lost")
        made = prepare_source(source)
        if made.publication_created and not made.slot_created:
            # What was written while there was no publication cannot be decoded (Postgres 17 and older), or was skipped.
            renew_slot(source, unreadable=True)
            made = made._replace(slot_created=prepare_source(source).slot_created)
        source.publication_created = source.publication_created or made.publication_created
        source.slot_created = source.slot_created or made.slot_created
        if made.publication_created:
            publish_tables(source, tables)
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "host") from None
    except psycopg.Error as error:
        raise ValidationError({"host": reason_of(error, source)}) from None
    with transaction.atomic():
        _current(source)
        audit.record("recover", source)
        source.save()  # its reader starts anew


def acknowledge_gap(source: Source) -> bool:
    """Somebody knows that changes may be missing. False: there is no gap."""
    with transaction.atomic():
        gap = lifecycle.gap(source.pk)
        if not lifecycle.acknowledge_gap(source.pk):
            return False
        audit.record("acknowledge_gap", source, gap=gap)
    return True


def _is_where_it_was(source: Source) -> bool:
    before = Source.objects.filter(pk=source.pk).first()
    if before is None or any(getattr(before, name) != getattr(source, name) for name in REACHED_BY):
        return False
    return before.status == "active"


def _save_source(source: Source, made: Prepared | None) -> None:
    before = Source.objects.filter(pk=source.pk).first()
    made = made or prepare(source)
    if made is not None:
        kept_slot = before is not None and before.slot_name == source.slot_name and before.slot_created
        kept_publication = before is not None and before.publication_name == source.publication_name and before.publication_created
        source.slot_created = made.slot_created or kept_slot
        source.publication_created = made.publication_created or kept_publication
    with transaction.atomic():
        _record(source, _current(source))
        source.save()
        if before is not None and before.slot_created and _slot_of(before) != _slot_of(source):
            lifecycle.note_source(
                source.pk, "slot_left",
                f"the slot {before.slot_name} stays behind on {before.host}:{before.port} and keeps WAL there until it is dropped:"
                f" SELECT pg_drop_replication_slot('{before.slot_name}')",
            )  # fmt: skip


def _slot_of(source: Source) -> tuple[str, int, str, str]:
    return source.host, source.port, source.database, source.slot_name


def _save_consumer(consumer: Consumer) -> None:
    before = None if consumer._state.adding else Consumer.objects.filter(pk=consumer.pk).first()
    if before is None and not consumer._state.adding:
        raise _deleted(consumer)
    consumer.notices = []
    if before is None or (before.tables, before.where) != (consumer.tables, consumer.where):
        consumer.notices += check_where(consumer)
    if before is None or (before.tables, before.group_columns) != (consumer.tables, consumer.group_columns):
        consumer.notices += check_groups(consumer)
    if before is None or before.tables != consumer.tables:
        _publish(consumer)
    if before is None:
        with transaction.atomic():
            _record(consumer, None)
            consumer.save()
            if consumer.start_from == "beginning":
                _begin_with_everything(consumer)
            else:
                epoch = lifecycle.epoch(consumer.source_id)
                lifecycle.create_position(consumer.pk, consumer.source_id, _position(consumer.source), epoch)
        return
    with transaction.atomic():
        # One under way goes by the configuration of before, and would pass over what arrives for this one once it is saved.
        lifecycle.keep_claims_out(consumer.pk)
        before = _current(consumer) or before
        if before.group_columns != consumer.group_columns:
            out, parked = lifecycle.held(consumer.pk)
            if out + parked:  # a claim was faster than this edit
                raise ValidationError({"group_columns": groups_in_use(out, parked)})
        if before.status != consumer.status:
            consumer.status_reason = ""
        dropped = lifecycle.backlog(consumer.pk).undelivered if consumer.status == "disabled" != before.status else None
        _record(consumer, before, dropped)
        consumer.save()
        if before.status != consumer.status:
            if consumer.status == "disabled":
                backfills.cancel_all(consumer.pk)
                lifecycle.disable(consumer.pk)
            elif before.status == "disabled":
                lifecycle.enable(consumer.pk)
        if (before.where, before.transform) != (consumer.where, consumer.transform):
            lifecycle.mended(consumer.pk)
        lifecycle.wake(consumer.pk)


def _current(thing: Thing) -> Thing | None:
    """Lock what is about to be saved, and return it as it is; None: it is new.

    Somebody may have saved it since it was read here. A status that was set meanwhile stays, unless this edit sets one too: pumps pause
    as well. Raises ValidationError for anything else, for the two were not judged together.
    """
    if thing.read_as is None:
        return None
    now = type(thing).objects.select_for_update(no_key=True).filter(pk=thing.pk).first()
    if now is None:
        raise _deleted(thing)
    others = []
    for field in thing._meta.concrete_fields:
        name = field.attname
        read, theirs = thing.read_as.get(name), getattr(now, name)
        if theirs == read or name == "updated_at":
            continue
        if name not in ("status", "status_reason"):
            others.append(field.name)
        elif getattr(thing, name) == read:
            setattr(thing, name, theirs)
    if others:
        raise ValidationError(f"somebody else has changed {', '.join(others)} of {thing.name} at this moment, and nothing was saved: look at it, and repeat")
    return now


def _deleted(thing: Source | HttpEndpoint | Consumer) -> ValidationError:
    return ValidationError(f"{thing.name} was deleted at this moment")


def _record(thing: Thing, before: Thing | None, count: int | None = None) -> None:
    """Before it is saved: what is new or different from `before`, secrets by name only."""
    told = {
        field.name: MASK if field.name in SECRET_FIELDS else _told(field.value_from_object(thing))
        for field in thing._meta.fields
        if field.name not in UNTOLD_FIELDS
        and (before is None or field.value_from_object(before) != field.value_from_object(thing))
    }  # fmt: skip
    if before is None:
        audit.record("create", thing)
    elif told:
        audit.record(str(told["status"]) if set(told) == {"status"} else "change", thing, count, **told)


def _told(value: Any) -> Any:
    text = str(value)
    return value if len(text) <= 200 else text[:200] + "…"


def _begin_with_everything(consumer: Consumer) -> None:
    """What a snapshot of the source sees comes as rows, by backfills; what it does not see as changes."""
    source = consumer.source
    try:
        last, epoch = lifecycle.last_id(source.pk), lifecycle.epoch(source.pk)
        begun = look_at_beginning(source)
        lifecycle.create_position_before(
            consumer.pk, source.pk, last, xmin=begun.xmin, xmax=begun.xmax, running=begun.running, is_standby=begun.is_standby,
            start_lsn=begun.lsn, start_epoch=epoch,
        )  # fmt: skip
        for table in tables_to_backfill(source, consumer.tables):
            backfills.begin(
                uuid4(), consumer_id=consumer.pk, source_id=source.pk, table=table, barrier_xid=inspect(source, table)
            )
    except SourceUnreachable as error:
        raise ValidationError({"source": f"{error}"}) from None
    except SetupRefused as error:
        raise ValidationError({"tables" if error.field == "table" else error.field: error.reason}) from None


def _begin_backfill(backfill: Backfill) -> None:
    if not backfill._state.adding:
        raise ValidationError("a backfill is not changed: cancel it and begin another")
    source = backfill.consumer.source
    try:
        barrier = inspect(
            source, backfill.table, where=backfill.where, sort_column=backfill.sort_column, start_value=backfill.start_value
        )
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "consumer") from None
    with transaction.atomic():
        audit.record("begin backfill", backfill.consumer, backfill=backfill.pk, table=backfill.table, where=backfill.where)
        backfills.begin(
            backfill.pk, consumer_id=backfill.consumer_id, source_id=source.pk, table=backfill.table, where=backfill.where,
            sort_column=backfill.sort_column, start_value=backfill.start_value, barrier_xid=barrier,
        )  # fmt: skip
    backfill.refresh_from_db()


def _publish(consumer: Consumer) -> None:
    try:
        publish_tables(consumer.source, consumer.tables)
    except (SourceUnreachable, SetupRefused) as error:
        raise as_validation(error, "source") from None
    except psycopg.Error as error:
        raise ValidationError({"tables": reason_of(error, consumer.source)}) from None


def _position(source: Source) -> int:
    try:
        return source_position(source)
    except SourceUnreachable as error:
        raise ValidationError(
            {"source": f"{error}. A new consumer begins at the source's present position, so the source must answer"}
        ) from None


def _delete_consumer(consumer: Consumer, discard: bool) -> None:
    with transaction.atomic():
        undelivered = lifecycle.backlog(consumer.pk).undelivered
        if undelivered and not discard:
            raise InUse(
                f"{consumer.name} has {undelivered} undelivered messages: delete it with ?discard=true to drop them"
            )
        audit.record("delete", consumer, undelivered or None)
        lifecycle.drop_consumer(consumer.pk)
        consumer.delete()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def errors_of(error: ValidationError) -> dict[str, Any]:
    """A ValidationError as `{"field": ["sentence", …]}`."""
    if hasattr(error, "error_dict"):
        return {("non_field_errors" if field == "__all__" else field): messages for field, messages in error.message_dict.items()}
    return {"non_field_errors": error.messages}
