"""The tables of what is configured; the store's own are made by 0002."""

import consumers.fields
import consumers.models
import django.contrib.postgres.fields
import django.core.validators
import django.db.models.deletion
import uuid
from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
    ]

    operations = [
        migrations.CreateModel(
            name='Attempt',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('source', models.UUIDField()),
                ('message_id', models.BigIntegerField()),
                ('at', models.DateTimeField()),
                ('ok', models.BooleanField()),
                ('status', models.IntegerField(null=True)),
                ('error', models.TextField(null=True)),
                ('duration_ms', models.IntegerField()),
                ('response', models.TextField(null=True)),
                ('url', models.TextField(null=True)),
                ('deliver_count', models.IntegerField()),
            ],
            options={
                'db_table': 'attempts',
                'ordering': ['-id'],
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='ConsumerPosition',
            fields=[
                ('consumer', models.UUIDField(primary_key=True, serialize=False)),
                ('source', models.UUIDField()),
                ('position', models.BigIntegerField()),
                ('start_lsn', models.BigIntegerField()),
                ('start_epoch', models.IntegerField()),
                ('out_count', models.IntegerField()),
                ('parked_count', models.IntegerField()),
                ('dead_count', models.IntegerField()),
                ('acked_count', models.BigIntegerField()),
                ('failed_count', models.BigIntegerField()),
                ('taken_at', models.DateTimeField(null=True)),
            ],
            options={
                'db_table': 'consumer_position',
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='Heartbeat',
            fields=[
                ('pk', models.CompositePrimaryKey('process', 'host', 'pid', blank=True, editable=False, primary_key=True, serialize=False)),
                ('process', models.TextField()),
                ('host', models.TextField()),
                ('pid', models.IntegerField()),
                ('at', models.DateTimeField()),
                ('detail', models.TextField()),
            ],
            options={
                'db_table': 'heartbeats',
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='Message',
            fields=[
                ('id', models.BigIntegerField(primary_key=True, serialize=False)),
                ('source', models.UUIDField()),
                ('action', models.CharField(max_length=1)),
                ('key', models.TextField()),
                ('old_key', models.TextField(null=True)),
                ('xid', models.BigIntegerField()),
                ('commit_lsn', models.BigIntegerField()),
                ('commit_idx', models.BigIntegerField()),
                ('committed_at', models.DateTimeField()),
                ('epoch', models.IntegerField()),
                ('record', models.TextField()),
                ('changes', models.TextField(null=True)),
                ('unchanged', models.TextField(null=True)),
                ('old_values_known', models.BooleanField()),
                ('annotations', models.TextField(null=True)),
                ('consumer', models.UUIDField(null=True)),
            ],
            options={
                'db_table': 'messages',
                'ordering': ['-id'],
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='Parked',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('source', models.UUIDField()),
                ('grp', models.BigIntegerField()),
                ('grp2', models.BigIntegerField(null=True)),
                ('first_id', models.BigIntegerField()),
                ('ids', django.contrib.postgres.fields.ArrayField(base_field=models.BigIntegerField(), size=None)),
                ('reason', models.TextField()),
                ('not_before', models.DateTimeField(null=True)),
                ('due_at', models.DateTimeField(null=True)),
                ('deliver_count', models.IntegerField()),
                ('max_batch', models.IntegerField(null=True)),
                ('last_error', models.TextField(null=True)),
                ('last_status', models.IntegerField(null=True)),
                ('lease_token', models.UUIDField(null=True)),
                ('parked_at', models.DateTimeField()),
            ],
            options={
                'verbose_name_plural': 'parked messages',
                'db_table': 'parked',
                'ordering': ['first_id'],
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='RelationVersion',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('source', models.UUIDField()),
                ('epoch', models.IntegerField()),
                ('oid', models.BigIntegerField()),
                ('schema_name', models.TextField()),
                ('table_name', models.TextField()),
                ('columns', models.JSONField()),
                ('primary_key', django.contrib.postgres.fields.ArrayField(base_field=models.TextField(), size=None)),
                ('replica_identity', models.TextField()),
                ('digest', models.TextField()),
                ('seen_at', models.DateTimeField()),
            ],
            options={
                'db_table': 'relation_version',
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='SourceEvent',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('source', models.UUIDField()),
                ('at', models.DateTimeField()),
                ('kind', models.TextField()),
                ('table_name', models.TextField(null=True)),
                ('text', models.TextField()),
                ('backfill', models.BooleanField()),
            ],
            options={
                'db_table': 'source_events',
                'ordering': ['-id'],
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='SourceStatus',
            fields=[
                ('source', models.UUIDField(primary_key=True, serialize=False)),
                ('state', models.TextField()),
                ('reasons', django.contrib.postgres.fields.ArrayField(base_field=models.TextField(), size=None)),
                ('retained_bytes', models.BigIntegerField(null=True)),
                ('source_lsn', models.BigIntegerField(null=True)),
                ('confirmed_lsn', models.BigIntegerField(null=True)),
                ('since', models.DateTimeField()),
                ('at', models.DateTimeField()),
            ],
            options={
                'db_table': 'source_status',
                'managed': False,
            },
        ),
        migrations.CreateModel(
            name='Consumer',
            fields=[
                ('id', models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=63, unique=True, validators=[consumers.models.validate_name])),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('kind', models.CharField(choices=[('push', 'push'), ('pull', 'pull')], max_length=4)),
                ('stream', models.CharField(choices=[('changes', 'changes'), ('rows', 'rows')], default='changes', max_length=7)),
                ('tables', django.contrib.postgres.fields.ArrayField(base_field=models.TextField(), blank=True, default=list, help_text='Empty: all of the publication.', size=None)),
                ('actions', django.contrib.postgres.fields.ArrayField(base_field=models.TextField(), blank=True, default=consumers.models.default_actions, size=None)),
                ('where', models.TextField(blank=True, default='')),
                ('transform', models.TextField(blank=True, default='')),
                ('group_columns', django.contrib.postgres.fields.ArrayField(base_field=models.TextField(), blank=True, default=list, help_text='Empty: the primary key. Messages of one group arrive in order.', size=None)),
                ('start_from', models.CharField(choices=[('now', 'now'), ('beginning', 'beginning')], default='now', max_length=9)),
                ('ack_wait_ms', models.IntegerField(default=30000, validators=[django.core.validators.MinValueValidator(500), django.core.validators.MaxValueValidator(43200000)])),
                ('max_ack_pending', models.IntegerField(default=10000, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000000)])),
                ('max_deliver', models.IntegerField(blank=True, help_text='Attempts before a message becomes a dead letter. Empty: for ever.', null=True, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000000)])),
                ('max_per_group', models.IntegerField(blank=True, help_text='Messages of one group in one batch. Empty: no limit.', null=True, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000)])),
                ('max_parked', models.IntegerField(default=1000000, editable=False)),
                ('max_backlog_bytes', models.BigIntegerField(blank=True, help_text='How much of the log it may hold back. Looked at each minute. Empty: no limit.', null=True, validators=[django.core.validators.MinValueValidator(1000000)])),
                ('on_full', models.CharField(blank=True, choices=[('hold', 'hold'), ('pause', 'pause'), ('drop_oldest', 'drop_oldest')], default='hold', help_text='Past that: hold everything and say so, pause the consumer, or drop its oldest messages.', max_length=11)),
                ('status_reason', models.TextField(blank=True, default='', editable=False, help_text='Why it was paused, when nobody did.')),
                ('status', models.CharField(choices=[('active', 'active'), ('paused', 'paused'), ('disabled', 'disabled')], default='active', max_length=8)),
                ('path', models.CharField(blank=True, default='', max_length=2000)),
                ('batch_size', models.IntegerField(default=1, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000)])),
                ('concurrency', models.IntegerField(default=10, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000)])),
            ],
            options={
                'ordering': ['name'],
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='HttpEndpoint',
            fields=[
                ('id', models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=63, unique=True, validators=[consumers.models.validate_name])),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('url', models.CharField(max_length=2000)),
                ('headers', models.JSONField(blank=True, default=dict, help_text='{"name": "value"}')),
                ('secret_headers', consumers.fields.EncryptedJSONField(blank=True, default=dict, help_text='The same, encrypted at rest.')),
                ('signing_secret', consumers.fields.EncryptedTextField(blank=True, default=consumers.models.new_signing_secret)),
                ('timeout_ms', models.IntegerField(default=30000, validators=[django.core.validators.MinValueValidator(100), django.core.validators.MaxValueValidator(60000)])),
            ],
            options={
                'verbose_name': 'HTTP endpoint',
                'ordering': ['name'],
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='Source',
            fields=[
                ('id', models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=63, unique=True, validators=[consumers.models.validate_name])),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('host', models.CharField(max_length=255)),
                ('port', models.IntegerField(default=5432, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(65535)])),
                ('database', models.CharField(max_length=63)),
                ('username', models.CharField(max_length=63)),
                ('password', consumers.fields.EncryptedTextField(blank=True, default='')),
                ('sslmode', models.CharField(blank=True, choices=[('disable', 'disable'), ('allow', 'allow'), ('prefer', 'prefer'), ('require', 'require'), ('verify-ca', 'verify-ca'), ('verify-full', 'verify-full')], default='', help_text='Empty: prefer for a local host, require for any other.', max_length=12)),
                ('ssl_root_cert', models.TextField(blank=True, default='', help_text='PEM text, or the path of a file, for verify-ca and verify-full.')),
                ('slot_name', models.CharField(default='sequin_slot', max_length=63, validators=[consumers.models.validate_identifier])),
                ('publication_name', models.CharField(default='sequin_pub', max_length=63)),
                ('status', models.CharField(choices=[('active', 'active'), ('paused', 'paused')], default='active', max_length=8)),
                ('slot_failover', models.BooleanField(default=False, help_text='Make the slot one that standbys keep in step, Postgres 17 and newer.')),
                ('slot_created', models.BooleanField(default=False, editable=False, help_text='We made the slot.')),
                ('publication_created', models.BooleanField(default=False, editable=False, help_text='We made the publication.')),
            ],
            options={
                'ordering': ['name'],
                'abstract': False,
            },
        ),
        migrations.CreateModel(
            name='ApiToken',
            fields=[
                ('id', models.UUIDField(default=uuid.uuid4, editable=False, primary_key=True, serialize=False)),
                ('name', models.CharField(max_length=63, unique=True, validators=[consumers.models.validate_name])),
                ('scope', models.CharField(choices=[('pull', 'pull'), ('manage', 'manage'), ('admin', 'admin')], default='pull', max_length=6)),
                ('token_hash', models.CharField(editable=False, max_length=64, unique=True)),
                ('prefix', models.CharField(editable=False, max_length=12)),
                ('created_at', models.DateTimeField(auto_now_add=True)),
                ('rate_limit', models.IntegerField(blank=True, help_text='Requests a second, in each web process; twice that in a burst. Empty: no limit.', null=True, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(1000000)])),
                ('last_used_at', models.DateTimeField(editable=False, null=True)),
                ('revoked_at', models.DateTimeField(blank=True, null=True)),
                ('expires_at', models.DateTimeField(blank=True, null=True)),
                ('consumers', models.ManyToManyField(blank=True, help_text='The consumers it reaches. Empty: all.', to='consumers.consumer')),
            ],
            options={
                'verbose_name': 'API token',
                'ordering': ['name'],
            },
        ),
        migrations.AddField(
            model_name='consumer',
            name='endpoint',
            field=models.ForeignKey(blank=True, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='consumers', to='consumers.httpendpoint'),
        ),
        migrations.AddField(
            model_name='consumer',
            name='source',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='consumers', to='consumers.source'),
        ),
    ]
