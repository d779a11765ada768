"""What a team configures: sources, endpoints, consumers, API tokens. The store's tables are read through store.models.

Every rule about a value is in `full_clean()`, so admin, API and loaddata refuse the same things with the same words.
What saving does elsewhere (slot, publication, position) is in `changes.py`.
"""
from __future__ import annotations

import ipaddress
import re
import secrets
import uuid
from base64 import b64encode
from collections.abc import Sequence
from copy import copy
from typing import Any, Self

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models

from consumers.alert_models import AlertDestination, AlertEpisode, AlertNotice, AlertRule  # noqa: F401  (found through this module)
from consumers.audit import AuditEntry  # noqa: F401
from consumers.login import LoginFailure  # noqa: F401
from consumers.fields import EncryptedJSONField, EncryptedTextField
from consumers.store.models import (  # noqa: F401  (Django finds the models through this module)
    Attempt,
    ConsumerPosition,
    Heartbeat,
    Message,
    Parked,
    RelationVersion,
    SourceEvent,
    SourceStatus,
)
from consumers.endpoint_rules import SIGNING_SECRET_PREFIX, check_headers, check_signing_secrets, check_url
from consumers.hosting import pooler_problem
from consumers.filters.checking import Notice
from consumers.routing import clean_transform, clean_where

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
WEAK_SSL_MODES = ("disable", "allow", "prefer")
ACTIONS = ("insert", "update", "delete", "truncate")
DEFAULT_ACTIONS = ("insert", "update", "delete")
MAX_ACK_WAIT_MS = 43_200_000
MIN_BACKLOG_BYTES = 1_000_000
ON_FULL = ("hold", "pause", "drop_oldest")


def validate_name(name: str) -> None:
    """1–63 letters, digits, `_ - .`, and not a UUID, which would read as an id."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", name or ""):
        raise ValidationError("expected 1 to 63 letters, digits, _ - or ., got %(name)s", params={"name": repr(name)})
    try:
        uuid.UUID(name)
    except ValueError:
        return
    raise ValidationError("a name may not look like a UUID: it would be taken for an id")


def validate_identifier(name: str) -> None:
    """A slot's name: what Postgres accepts."""
    if not re.fullmatch(r"[a-z0-9_]{1,63}", name or ""):
        raise ValidationError(
            "expected 1 to 63 lower-case letters, digits or _, as Postgres demands of a slot, got %(name)s",
            params={"name": repr(name)},
        )


def validate_table(name: Any) -> None:
    """`schema.table` or `schema.*`."""
    if not isinstance(name, str) or not re.fullmatch(r"[^.\0]{1,63}\.[^\0]{1,63}", name):
        raise ValidationError(
            'expected "schema.table" or "schema.*", such as "public.orders", got %(name)s', params={"name": repr(name)}
        )


def is_local_host(host: str) -> bool:
    """A loopback name or address, or the directory of a Unix socket."""
    if host.startswith("/") or host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Named(models.Model):
    """An object known by a unique name and by a UUID that a rename does not change."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=63, unique=True, validators=[validate_name])
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        abstract = True
        ordering = ["name"]

    read_as: dict[str, Any] | None = None
    """What the store said when this was read from it, or saved; None: neither has happened."""

    def __str__(self) -> str:
        return self.name

    @classmethod
    def from_db(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().from_db(*args, **kwargs)
        made._remember()
        return made

    def refresh_from_db(self, *args: Any, **kwargs: Any) -> None:
        super().refresh_from_db(*args, **kwargs)
        self._remember()

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self._remember()

    def _remember(self) -> None:
        self.read_as = {field.attname: copy(self.__dict__[field.attname]) for field in self._meta.concrete_fields if field.attname in self.__dict__}

    def clean_fields(self, exclude: Any = None) -> None:
        """As Django's, and what is no choice is told the choices."""
        try:
            super().clean_fields(exclude)
        except ValidationError as refused:
            for name, errors in refused.error_dict.items():
                for error in (error for error in errors if error.code == "invalid_choice"):
                    choices = self._meta.get_field(name).choices or ()  # type: ignore[union-attr]
                    error.message = f"expected one of {', '.join(value for value, _ in choices)}, got %(value)r"
            raise

    def natural_key(self) -> tuple[str]:
        return (self.name,)


class ByName(models.Manager[Any]):
    def get_by_natural_key(self, name: str) -> Any:
        return self.get(name=name)


class Source(Named):
    """A Postgres database we capture from, with its slot and publication."""

    host = models.CharField(max_length=255)
    port = models.IntegerField(default=5432, validators=[MinValueValidator(1), MaxValueValidator(65535)])
    database = models.CharField(max_length=63)
    username = models.CharField(max_length=63)
    password = EncryptedTextField(blank=True, default="")
    sslmode = models.CharField(
        max_length=12, blank=True, default="", choices=[(mode, mode) for mode in SSL_MODES],
        help_text="Empty: prefer for a local host, require for any other.",
    )  # fmt: skip
    ssl_root_cert = models.TextField(
        blank=True, default="", help_text="PEM text, or the path of a file, for verify-ca and verify-full."
    )
    slot_name = models.CharField(max_length=63, default="sequin_slot", validators=[validate_identifier])
    publication_name = models.CharField(max_length=63, default="sequin_pub")
    status = models.CharField(max_length=8, default="active", choices=[("active", "active"), ("paused", "paused")])
    slot_failover = models.BooleanField(
        default=False, help_text="Make the slot one that standbys keep in step, Postgres 17 and newer."
    )
    slot_created = models.BooleanField(default=False, editable=False, help_text="We made the slot.")
    publication_created = models.BooleanField(default=False, editable=False, help_text="We made the publication.")

    objects = ByName()

    class Meta(Named.Meta):
        abstract = False
        permissions = [("operate_source", "Can pause, resume, check and recover sources")]

    @property
    def effective_sslmode(self) -> str:
        return self.sslmode or ("prefer" if is_local_host(self.host) else "require")

    def clean(self) -> None:
        errors: dict[str, str] = {}
        if re.search(r"[\0\s]", self.host or ""):
            errors["host"] = "may not contain spaces or line breaks"
        for field in ("database", "username", "publication_name"):
            if re.search(r"[\0\r\n]", getattr(self, field) or ""):
                errors[field] = "may not contain line breaks"
        if self.host and (problem := pooler_problem(self.host, self.port or 5432, self.username)):
            errors["host"] = problem
        if self.host and self.sslmode in WEAK_SSL_MODES and not is_local_host(self.host) and not settings.SEQUIN_ALLOW_PLAINTEXT:
            errors["sslmode"] = (
                f"{self.sslmode} would send data unencrypted to {self.host}: expected require, verify-ca or verify-full"
                " (SEQUIN_ALLOW_PLAINTEXT=1 permits it)"
            )
        if self.sslmode in ("verify-ca", "verify-full") and not self.ssl_root_cert:
            errors["ssl_root_cert"] = f"sslmode {self.sslmode} needs the certificate of the authority"
        twin = Source.objects.filter(
            host=self.host, port=self.port, database=self.database, slot_name=self.slot_name
        ).exclude(pk=self.pk).first()  # fmt: skip
        if twin is not None:
            errors["slot_name"] = f"the source {twin.name} already reads this slot; two readers would take from each other"
        if errors:
            raise ValidationError(errors)


def new_signing_secret() -> str:
    return SIGNING_SECRET_PREFIX + b64encode(secrets.token_bytes(24)).decode()


class HttpEndpoint(Named):
    """Where messages are pushed to."""

    url = models.CharField(max_length=2000)
    headers = models.JSONField(default=dict, blank=True, help_text='{"name": "value"}')
    secret_headers = EncryptedJSONField(default=dict, blank=True, help_text="The same, encrypted at rest.")
    signing_secret = EncryptedTextField(blank=True, default=new_signing_secret)
    timeout_ms = models.IntegerField(default=30_000, validators=[MinValueValidator(100), MaxValueValidator(60_000)])

    objects = ByName()

    class Meta(Named.Meta):
        abstract = False
        verbose_name = "HTTP endpoint"

    def clean(self) -> None:
        errors: dict[str, str] = {}
        if problem := check_url(self.url):
            errors["url"] = problem
        for field in ("headers", "secret_headers"):
            if problem := check_headers(getattr(self, field)):
                errors[field] = problem
        if not self.signing_secret:
            self.signing_secret = new_signing_secret()
        if problem := check_signing_secrets(self.signing_secret):
            errors["signing_secret"] = problem
        if errors:
            raise ValidationError(errors)


def default_actions() -> list[str]:
    return list(DEFAULT_ACTIONS)


class Consumer(Named):
    """A configured destination: which changes, to whom, how many at a time."""

    source = models.ForeignKey(Source, models.PROTECT, related_name="consumers")
    kind = models.CharField(max_length=4, choices=[("push", "push"), ("pull", "pull")])
    stream = models.CharField(max_length=7, default="changes", choices=[("changes", "changes"), ("rows", "rows")])
    tables = ArrayField(models.TextField(), default=list, blank=True, help_text="Empty: all of the publication.")
    actions = ArrayField(models.TextField(), default=default_actions, blank=True)
    where = models.TextField(blank=True, default="")
    transform = models.TextField(blank=True, default="")
    group_columns = ArrayField(
        models.TextField(), default=list, blank=True, help_text="Empty: the primary key. Messages of one group arrive in order."
    )
    start_from = models.CharField(max_length=9, default="now", choices=[("now", "now"), ("beginning", "beginning")])
    ack_wait_ms = models.IntegerField(default=30_000, validators=[MinValueValidator(500), MaxValueValidator(MAX_ACK_WAIT_MS)])
    max_ack_pending = models.IntegerField(default=10_000, validators=[MinValueValidator(1), MaxValueValidator(1_000_000)])
    max_deliver = models.IntegerField(
        null=True, blank=True, validators=[MinValueValidator(1), MaxValueValidator(1_000_000)],
        help_text="Attempts before a message becomes a dead letter. Empty: for ever.",
    )  # fmt: skip
    max_per_group = models.IntegerField(
        null=True, blank=True, validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="Messages of one group in one batch. Empty: no limit.",
    )  # fmt: skip
    max_parked = models.IntegerField(default=1_000_000, editable=False)
    max_backlog_bytes = models.BigIntegerField(
        null=True, blank=True, validators=[MinValueValidator(MIN_BACKLOG_BYTES)],
        help_text="How much of the log it may hold back. Looked at each minute. Empty: no limit.",
    )  # fmt: skip
    on_full = models.CharField(
        max_length=11, blank=True, default="hold", choices=[(choice, choice) for choice in ON_FULL],
        help_text="Past that: hold everything and say so, pause the consumer, or drop its oldest messages.",
    )  # fmt: skip
    status = models.CharField(
        max_length=8, default="active", choices=[("active", "active"), ("paused", "paused"), ("disabled", "disabled")]
    )
    status_reason = models.TextField(blank=True, default="", editable=False, help_text="Why it was paused, when nobody did.")
    endpoint = models.ForeignKey(HttpEndpoint, models.PROTECT, null=True, blank=True, related_name="consumers")
    path = models.CharField(max_length=2000, blank=True, default="")
    batch_size = models.IntegerField(default=1, validators=[MinValueValidator(1), MaxValueValidator(1000)])
    concurrency = models.IntegerField(default=10, validators=[MinValueValidator(1), MaxValueValidator(1000)])

    objects = ByName()
    notices: Sequence[Notice] = ()  # of the last save: where filter or groups are not what they seem

    class Meta(Named.Meta):
        abstract = False
        permissions = [("operate_consumer", "Can pause, resume and replay consumers, retry and discard messages")]

    def clean(self) -> None:
        errors: dict[str, Any] = {}
        if not self.actions:
            self.actions = list(DEFAULT_ACTIONS)
        self.on_full = self.on_full or "hold"
        if self.status == "active":
            self.status_reason = ""
        self._clean_lists(errors)
        self._clean_kind(errors)
        self._clean_routing(errors)
        self._refuse_what_is_fixed(errors)
        if errors:
            raise ValidationError(errors)

    def takes(self, table: str) -> bool:
        """Whether this "schema.table" is one of its tables."""
        return not self.tables or table in self.tables or f"{table.split('.', 1)[0]}.*" in self.tables

    def _clean_lists(self, errors: dict[str, Any]) -> None:
        for table in self.tables:
            try:
                validate_table(table)
            except ValidationError as error:
                errors["tables"] = error.messages
        unknown = [action for action in self.actions if action not in ACTIONS]
        if unknown:
            errors["actions"] = f"expected some of {', '.join(ACTIONS)}, got {', '.join(map(repr, unknown))}"
        for field in ("tables", "actions", "group_columns"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                errors[field] = "names something twice"
            if any("\0" in value for value in values):
                errors[field] = "may not contain a NUL character"

    def _clean_kind(self, errors: dict[str, Any]) -> None:
        if self.kind == "push" and self.endpoint_id is None:
            errors["endpoint"] = "a push consumer needs an endpoint"
        if self.kind == "pull" and self.endpoint_id is not None:
            errors["endpoint"] = "a pull consumer has no endpoint"
        if self.path and (not self.path.startswith(("/", "?")) or re.search(r"[\s\0#]", self.path)):
            errors["path"] = "expected a path such as /hooks/orders, without spaces and without #"

    def _clean_routing(self, errors: dict[str, Any]) -> None:
        """Against the tables they are judged when it is saved (`changes.py`)."""
        if not self.where.strip():
            self.where = ""
        if not self.transform.strip():
            self.transform = ""
        before = None if self._state.adding else Consumer.objects.filter(pk=self.pk).values("where", "transform").first()
        for field, clean in (("where", clean_where), ("transform", clean_transform)):
            text = getattr(self, field)
            if text and (before is None or before[field] != text):
                try:
                    clean(text)
                except ValidationError as error:
                    errors[field] = error.messages
        if self.stream == "rows" and not {"insert", "update"} & set(self.actions):
            errors["actions"] = "a stream of rows delivers the latest state of rows: expected insert, update or both"

    def _refuse_what_is_fixed(self, errors: dict[str, Any]) -> None:
        if self._state.adding:
            return
        before = Consumer.objects.filter(pk=self.pk).first()
        if before is None:
            return
        for field in ("source_id", "kind", "stream"):
            if getattr(self, field) != getattr(before, field):
                errors[field.removesuffix("_id")] = "is fixed at creation: make another consumer"
        if self.start_from != before.start_from:
            errors["start_from"] = "counts at creation only: begin a backfill, or rewind"
        if self.group_columns != before.group_columns:
            position = ConsumerPosition.objects.filter(consumer=self.pk).first()
            if position is not None and position.out_count + position.parked_count > 0:
                errors["group_columns"] = groups_in_use(position.out_count, position.parked_count)


def groups_in_use(out: int, parked: int) -> ValidationError:
    """Messages grouped by the old columns would be overtaken by others of their new groups."""
    return ValidationError(
        f"changes only when nothing is out or parked: {out} are out and {parked} parked. Pause the consumer and wait, or discard them",
        code="in_use",
    )


class Backfill(models.Model):
    """A table's rows on their way to one consumer as read messages; or what is republished to it. Written by store.backfills."""

    STATUSES = ("running", "paused", "completed", "cancelled", "failed")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    consumer = models.ForeignKey(Consumer, models.DO_NOTHING, db_column="consumer", db_constraint=False, related_name="backfills")
    source = models.UUIDField(null=True, blank=True, editable=False)
    kind = models.TextField(default="backfill", editable=False)
    table = models.TextField(db_column="table_name", help_text="schema.table")
    where = models.TextField(blank=True, default="")
    sort_column = models.TextField(blank=True, default="", help_text="Empty: the primary key.")
    start_value = models.TextField(null=True, blank=True, help_text="Of the sort column, inclusive. Empty: the first.")
    since = models.DateTimeField(null=True, blank=True, editable=False)
    until = models.DateTimeField(null=True, blank=True, editable=False)
    replay = models.UUIDField(null=True, blank=True, editable=False)
    status = models.TextField(default="running", editable=False)
    reason = models.TextField(blank=True, default="", editable=False)
    created_at = models.DateTimeField(null=True, blank=True, editable=False)
    ended_at = models.DateTimeField(null=True, blank=True, editable=False)
    rows_estimated = models.BigIntegerField(null=True, blank=True, editable=False)
    rows_done = models.BigIntegerField(default=0, editable=False)
    rows_left_out = models.BigIntegerField(default=0, editable=False)
    rate = models.FloatField(null=True, blank=True, editable=False, help_text="Rows a second, lately.")

    class Meta:
        managed = False
        db_table = "backfills"
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.table} to {self.consumer.name}"

    @property
    def seconds_left(self) -> float | None:
        """By the rate it has had lately; None when nobody can tell."""
        if self.status != "running" or not self.rate or self.rows_estimated is None:
            return None
        return max(0, self.rows_estimated - self.rows_done) / self.rate

    def clean(self) -> None:
        errors: dict[str, Any] = {}
        try:
            validate_table(self.table)
        except ValidationError as error:
            errors["table"] = error.messages
        if not errors and (self.table.endswith(".*") or not self._is_taken()):
            errors["table"] = f"{self.table} is not one of the consumer's tables: a backfill is of one of these"
        self.where = self.where.strip()
        try:
            if self.where:
                clean_where(self.where)
        except ValidationError as error:
            errors["where"] = error.messages
        if self.consumer_id and self.consumer.status == "disabled":
            errors["consumer"] = f"{self.consumer.name} is disabled and drops what comes: enable it first"
        for field in ("table", "sort_column", "start_value"):
            if "\0" in (getattr(self, field) or ""):
                errors[field] = "may not contain a NUL character"
        if errors:
            raise ValidationError(errors)

    def _is_taken(self) -> bool:
        return not self.consumer_id or self.consumer.takes(self.table)


class ApiToken(models.Model):
    """A key to the API. Only its hash is kept."""

    SCOPES = ("pull", "manage", "admin")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=63, unique=True, validators=[validate_name])
    scope = models.CharField(max_length=6, default="pull", choices=[(scope, scope) for scope in SCOPES])
    token_hash = models.CharField(max_length=64, unique=True, editable=False)
    prefix = models.CharField(max_length=12, editable=False)
    consumers: models.ManyToManyField[Any, Any] = models.ManyToManyField(
        Consumer, blank=True, help_text="The consumers it reaches. Empty: all."
    )
    created_at = models.DateTimeField(auto_now_add=True)
    rate_limit = models.IntegerField(
        null=True, blank=True, validators=[MinValueValidator(1), MaxValueValidator(1_000_000)],
        help_text="Requests a second, in each web process; twice that in a burst. Empty: no limit.",
    )  # fmt: skip
    last_used_at = models.DateTimeField(null=True, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)

    objects = ByName()

    class Meta:
        ordering = ["name"]
        verbose_name = "API token"

    def __str__(self) -> str:
        return self.name

    def natural_key(self) -> tuple[str]:
        return (self.name,)

    def mask(self: Self) -> str:
        return f"{self.prefix}…"
