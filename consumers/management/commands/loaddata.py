"""`manage.py loaddata FILE…`: set up sources, endpoints, consumers and backfills from fixtures.

Django's own loaddata validates nothing and overwrites every field. This one looks each object up by its natural key, sets
only the fields the fixture names, validates, and saves through `consumers.changes`, so creating has the same effects as in
console and API, and loading twice changes nothing.
"""
from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import models, transaction

from consumers import audit, changes
from consumers.models import ApiToken, Backfill, Consumer, HttpEndpoint, Source
from consumers.source_connection import SourceUnreachable
from consumers.source_setup import Prepared as SourcePrepared
from consumers.source_setup import drop_slot

Prepared = tuple[Source, SourcePrepared]

MODELS: dict[str, type[Source] | type[HttpEndpoint] | type[Consumer] | type[Backfill]] = {
    "consumers.source": Source,
    "consumers.httpendpoint": HttpEndpoint,
    "consumers.consumer": Consumer,
    "consumers.backfill": Backfill,
}
BACKFILL_FIELDS = ("table", "where", "sort_column", "start_value")  # with the consumer they tell backfills apart
log = logging.getLogger(__name__)
FIXTURE_DIR = "fixtures"


class Refused(Exception):
    """What is wrong with one object: a field, or "" for the object itself, and a sentence."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(reason)


class Command(BaseCommand):
    help = "Load fixtures: one transaction; created, changed and unchanged objects are counted."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("files", nargs="+", metavar="FILE")

    def handle(self, *_: Any, **options: Any) -> None:
        audit.acting_as("command loaddata")
        counts = {"created": 0, "changed": 0, "unchanged": 0}
        entries = [
            (path, number, entry)
            for path in map(_find, options["files"])
            for number, entry in enumerate(_read(path), 1)
        ]  # fmt: skip
        # What is referred to comes first, whatever the order in the files.
        order = {label: place for place, label in enumerate(MODELS)}
        entries.sort(key=lambda one: order.get(_label(one[2]), 0))
        prepared: dict[Any, Prepared] = {}
        try:
            # Slots first and outside the transaction: making one waits for every open transaction of its server, which
            # would be ours where the source shares the store's server.
            for path, number, entry in entries:
                with _named(path, number, entry):
                    _prepare(entry, prepared)
            with transaction.atomic():
                late = []
                for one in entries:
                    with _named(*one):
                        if _is_late(one[2]):
                            late.append(one)
                        else:
                            counts[_load(one[2], prepared)] += 1
                # An edited consumer hands nothing out until all of this is saved: what its source takes time for is done before.
                for one in late:
                    with _named(*one):
                        _rehearse(one[2])
                for one in late:
                    with _named(*one):
                        counts[_load(one[2], prepared)] += 1
        except BaseException:
            for source, made in prepared.values():
                _undo(source, made)
            raise
        self.stdout.write(", ".join(f"{count} {what}" for what, count in counts.items()))


@contextmanager
def _named(path: Path, number: int, entry: Any) -> Iterator[None]:
    """An error is one line with file, object and field."""
    try:
        yield
    except Refused as error:
        where = f": {error.field}" if error.field else ""
        raise CommandError(f"{path}: object {number} ({_title(entry)}){where}: {error.reason}") from None
    except ValidationError as error:
        field, messages = next(iter(changes.errors_of(error).items()))
        where = "" if field == "non_field_errors" else f": {field}"
        raise CommandError(f"{path}: object {number} ({_title(entry)}){where}: {' '.join(messages)}") from None


def _prepare(entry: Any, prepared: dict[Any, Prepared]) -> None:
    """Make slot and publication of a source that is new, or moves."""
    if _label(entry) == Backfill._meta.label_lower:
        return  # it refers to a consumer that may not be saved yet
    model, thing, fields, created = _understand(entry)
    if not isinstance(thing, Source):
        return  # it may refer to what is not saved yet
    changed = _assign(model, thing, fields, created)
    if changed and thing.name not in prepared:
        thing.full_clean()
        made = changes.prepare(thing)
        if made is not None:
            prepared[thing.name] = (thing, made)


def _is_late(entry: Any) -> bool:
    """An edit of a consumer, or what may refer to one."""
    label = _label(entry)
    return label == Backfill._meta.label_lower or (label == Consumer._meta.label_lower and not _understand(entry)[3])


def _rehearse(entry: Any) -> None:
    if _label(entry) == Consumer._meta.label_lower:
        model, thing, fields, created = _understand(entry)
        if _assign(model, thing, fields, created):
            thing.full_clean()
            changes.rehearse(thing)


def _undo(source: Source, made: SourcePrepared) -> None:
    """Leave no slot behind when the fixture was refused after all."""
    source.slot_created, source.publication_created = made
    if any(made):
        try:
            drop_slot(source)
        except (SourceUnreachable, psycopg.Error) as error:
            raise CommandError(f"the fixture was refused, and the slot {source.slot_name} is left behind: {error}") from None


def _find(name: str) -> Path:
    for path in (Path(name), settings.BASE_DIR / FIXTURE_DIR / name, settings.BASE_DIR / FIXTURE_DIR / f"{name}.json"):
        if path.is_file():
            return path
    raise CommandError(f"{name}: there is no such file, here or in {FIXTURE_DIR}/")


def _read(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise CommandError(f"{path}: is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise CommandError(f"{path}: expected a list of objects, got {type(entries).__name__}")
    return entries


def _title(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "not an object"
    fields = entry.get("fields")
    name = fields.get("name") if isinstance(fields, dict) else None
    return f"{entry.get('model')} {name}" if name else str(entry.get("model"))


def _understand(entry: Any) -> tuple[Any, Any, dict[str, Any], bool]:
    """The model, the object found or new, the fields named, and whether it is new."""
    if not isinstance(entry, dict) or not isinstance(entry.get("fields"), dict):
        raise Refused("", 'expected {"model": "consumers.…", "fields": {…}}')
    unknown = set(entry) - {"model", "fields", "pk"}
    if unknown:
        raise Refused("", f"unknown member {', '.join(sorted(unknown))}; expected model, fields and perhaps pk")
    label = _label(entry)
    if label == ApiToken._meta.label_lower:
        raise Refused("", "tokens are made with create_api_token or in the console, never by a fixture")
    model = MODELS.get(label)
    if model is None:
        raise Refused("model", f"expected one of {', '.join(MODELS)}, got {entry.get('model')!r}")
    fields = {name: _from_environment(name, value) for name, value in entry["fields"].items()}
    if model is Backfill:
        thing, created = _look_up_backfill(entry.get("pk"), fields)
    else:
        thing, created = _look_up(model, entry.get("pk"), fields)
    return model, thing, fields, created


def _load(entry: Any, prepared: dict[Any, Prepared]) -> str:
    model, thing, fields, created = _understand(entry)
    if not _assign(model, thing, fields, created):
        return "unchanged"
    changes.save(thing, prepared.get(thing.name, (None, None))[1] if isinstance(thing, Source) else None)
    for notice in getattr(thing, "notices", ()):
        log.warning("%s: %s%s", thing.name, notice.text, f" – {notice.sql}" if notice.sql else "")
    return "created" if created else "changed"


def _label(entry: Any) -> str:
    return str(entry.get("model", "")).lower() if isinstance(entry, dict) else ""


def _look_up_backfill(pk: Any, fields: dict[str, Any]) -> tuple[Backfill, bool]:
    """The same backfill, whatever has become of it: loading a fixture again begins nothing."""
    for required in ("consumer", "table"):
        if fields.get(required) is None:
            raise Refused(required, "is required")
    start = fields.get("start_value")
    if isinstance(start, (int, float)) and not isinstance(start, bool):
        fields["start_value"] = str(start)
    consumer = _referred("consumer", Backfill._meta.get_field("consumer"), fields["consumer"])
    new = Backfill(pk=pk) if pk is not None else Backfill()
    _assign(Backfill, new, fields, True)
    same = {name: getattr(new, name) for name in BACKFILL_FIELDS}
    found = Backfill.objects.filter(consumer=consumer, kind="backfill", **same).order_by("created_at").first()
    return (found, False) if found is not None else (new, True)


def _look_up(model: Any, pk: Any, fields: dict[str, Any]) -> tuple[Any, bool]:
    name = fields.get("name")
    try:
        thing = model.objects.filter(pk=pk).first() if pk is not None else None
    except (ValidationError, ValueError):
        raise Refused("pk", f"expected a UUID, got {pk!r}") from None
    if thing is None and isinstance(name, str):
        thing = model.objects.filter(name=name).first()
        if thing is not None and pk is not None and str(thing.pk) != str(pk):
            raise Refused("pk", f"{name} exists already and has the id {thing.pk}")
    if thing is not None:
        return thing, False
    if not isinstance(name, str):
        raise Refused("name", "is required")
    return (model(pk=pk) if pk is not None else model()), True


def _assign(model: Any, thing: Any, fields: dict[str, Any], created: bool) -> bool:
    """Set the fields the fixture names; true when one differs from what is saved."""
    changed = False
    for name, value in fields.items():
        try:
            field = model._meta.get_field(name)
        except FieldDoesNotExist:
            field = None
        if field is None or not isinstance(field, models.Field) or (not field.editable and name != "id"):
            known = sorted(f.name for f in model._meta.fields if f.editable and f.name != "id")
            raise Refused(name, f"is not a field; expected some of {', '.join(known)}")
        find = _referred if isinstance(field, models.ForeignKey) else _typed
        value = find(name, field, value)
        known = getattr(thing, field.attname)
        if known != (value.pk if isinstance(value, models.Model) else value):
            setattr(thing, name, value)
            changed = True
    return changed or created


def _typed(name: str, field: models.Field[Any, Any], value: Any) -> Any:
    if value is None and field.null:
        return None
    wrong_text = isinstance(field, (models.CharField, models.TextField)) and not isinstance(value, (str, dict))
    wrong_int = isinstance(field, models.IntegerField) and (isinstance(value, bool) or not str(value).lstrip("-").isdigit())
    if value is None or wrong_text or wrong_int:
        kind = "a list of texts" if hasattr(field, "base_field") else "a text"
        kind = "a whole number" if wrong_int or isinstance(field, models.IntegerField) else kind
        raise Refused(name, f"expected {kind}, got {json.dumps(value)}")
    if hasattr(field, "base_field") and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise Refused(name, f"expected a list of texts, got {json.dumps(value)}")
    try:
        return field.to_python(value)
    except ValidationError as error:
        raise Refused(name, " ".join(error.messages)) from None


def _referred(name: str, field: Any, value: Any) -> Any:
    """`["name"]` (Django's natural key), `"name"`, or an id."""
    if value is None:
        return None
    key = value[0] if isinstance(value, list) and len(value) == 1 else value
    model = field.related_model
    found = None
    if isinstance(key, str):
        found = model.objects.filter(name=key).first()
        if found is None:
            try:
                found = model.objects.filter(pk=key).first()
            except ValidationError:
                found = None
    if found is None:
        raise Refused(name, f"there is no {model._meta.verbose_name} {json.dumps(value)}; write it as [\"NAME\"]")
    return found


def _from_environment(name: str, value: Any) -> Any:
    """Replace "env:NAME" by the variable's value, also inside an object."""
    if isinstance(value, dict):
        return {key: _from_environment(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("env:"):
        variable = value.removeprefix("env:")
        if variable not in os.environ:
            raise Refused(name, f"the environment variable {variable} is not set")
        return os.environ[variable]
    return value
