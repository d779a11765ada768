"""The store's tables as unmanaged models, for reading: console, API, health. Writing is done by this package's functions."""
from __future__ import annotations

from django.contrib.postgres.fields import ArrayField
from django.db import models


class Message(models.Model):
    """One change in the log."""

    id = models.BigIntegerField(primary_key=True)
    source = models.UUIDField()
    relation = models.ForeignKey("RelationVersion", models.DO_NOTHING, db_column="relation", db_constraint=False)
    action = models.CharField(max_length=1)
    key = models.TextField()
    old_key = models.TextField(null=True)
    xid = models.BigIntegerField()
    commit_lsn = models.BigIntegerField()
    commit_idx = models.BigIntegerField()
    committed_at = models.DateTimeField()
    epoch = models.IntegerField()
    record = models.TextField()
    changes = models.TextField(null=True)
    unchanged = models.TextField(null=True)
    old_values_known = models.BooleanField()
    annotations = models.TextField(null=True)
    consumer = models.UUIDField(null=True)
    backfill = models.UUIDField(null=True)
    replay = models.UUIDField(null=True)

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "messages"
        ordering = ["-id"]
        permissions = [("erase_message", "Can erase a key")]

    def __str__(self) -> str:
        return str(self.id)


class RelationVersion(models.Model):
    """One shape of a table of a source."""

    source = models.UUIDField()
    epoch = models.IntegerField()
    oid = models.BigIntegerField()
    schema_name = models.TextField()
    table_name = models.TextField()
    columns = models.JSONField()
    primary_key = ArrayField(models.TextField())
    replica_identity = models.TextField()
    digest = models.TextField()
    seen_at = models.DateTimeField()

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "relation_version"

    def __str__(self) -> str:
        return f"{self.schema_name}.{self.table_name}"


class Parked(models.Model):
    """Messages of one group that a consumer cannot have now: to be retried, blocked, in error, or dead."""

    consumer = models.ForeignKey("Consumer", models.DO_NOTHING, db_column="consumer", db_constraint=False)
    source = models.UUIDField()
    grp = models.BigIntegerField()
    grp2 = models.BigIntegerField(null=True)
    first_id = models.BigIntegerField()
    ids = ArrayField(models.BigIntegerField())
    reason = models.TextField()
    not_before = models.DateTimeField(null=True)
    due_at = models.DateTimeField(null=True)
    deliver_count = models.IntegerField()
    max_batch = models.IntegerField(null=True)
    last_error = models.TextField(null=True)
    last_status = models.IntegerField(null=True)
    lease_token = models.UUIDField(null=True)
    parked_at = models.DateTimeField()

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "parked"
        ordering = ["first_id"]
        verbose_name_plural = "parked messages"

    def __str__(self) -> str:
        return f"{self.reason} {self.first_id}"


class Attempt(models.Model):
    """One push of one message."""

    consumer = models.ForeignKey("Consumer", models.DO_NOTHING, db_column="consumer", db_constraint=False)
    source = models.UUIDField()
    message_id = models.BigIntegerField()
    at = models.DateTimeField()
    ok = models.BooleanField()
    status = models.IntegerField(null=True)
    error = models.TextField(null=True)
    duration_ms = models.IntegerField()
    response = models.TextField(null=True)
    url = models.TextField(null=True)
    deliver_count = models.IntegerField()
    headers = models.TextField(null=True)

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "attempts"
        ordering = ["-id"]

    def __str__(self) -> str:
        return f"{self.message_id} {'ok' if self.ok else self.error}"


class SourceStatus(models.Model):
    """How a source is doing, as its reader last said."""

    source = models.UUIDField(primary_key=True)
    state = models.TextField()
    reasons = ArrayField(models.TextField())
    retained_bytes = models.BigIntegerField(null=True)
    source_lsn = models.BigIntegerField(null=True)
    confirmed_lsn = models.BigIntegerField(null=True)
    since = models.DateTimeField()
    at = models.DateTimeField()

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "source_status"

    def __str__(self) -> str:
        return self.state


class SourceEvent(models.Model):
    """What happened to a source that people should know."""

    source = models.UUIDField()
    at = models.DateTimeField()
    kind = models.TextField()
    table_name = models.TextField(null=True)
    text = models.TextField()
    backfill = models.BooleanField()

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "source_events"
        ordering = ["-id"]

    def __str__(self) -> str:
        return self.text


class ConsumerPosition(models.Model):
    """A consumer's place in the log, and how many messages it has in which state."""

    consumer = models.UUIDField(primary_key=True)
    source = models.UUIDField()
    position = models.BigIntegerField()
    start_lsn = models.BigIntegerField()
    start_epoch = models.IntegerField()
    out_count = models.IntegerField()
    parked_count = models.IntegerField()
    dead_count = models.IntegerField()
    acked_count = models.BigIntegerField()
    failed_count = models.BigIntegerField()
    filtered_count = models.BigIntegerField()
    undecided_count = models.BigIntegerField()
    taken_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "consumer_standing"

    def __str__(self) -> str:
        return str(self.position)


class Heartbeat(models.Model):
    """When a process last said that it is getting on."""

    pk = models.CompositePrimaryKey("process", "host", "pid")
    process = models.TextField()
    host = models.TextField()
    pid = models.IntegerField()
    at = models.DateTimeField()
    detail = models.TextField()

    class Meta:
        app_label = "consumers"
        managed = False
        db_table = "heartbeats"

    def __str__(self) -> str:
        return f"{self.process} {self.host} {self.pid}"
