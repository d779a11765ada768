"""The log, what is parked, and the attempts: to look at, and to let stuck messages go again."""
from __future__ import annotations

import json
from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.utils.functional import cached_property
from django.utils.html import format_html
from unfold.admin import ModelAdmin
from unfold.decorators import display

from consumers import audit
from consumers.admin.json_text import pretty
from consumers.admin.pages import ask, is_confirmed, tell_how_many
from consumers.models import Source
from consumers.store import lifecycle
from consumers.store.models import Attempt, Message, Parked
from consumers.store.types import ACTIONS
from consumers.templatetags.console import pill
from consumers.words import counted

COUNTED = 2_000
SHOWN_BACK = 30_000  # messages


class EstimatingPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through millions of rows without counting them: beyond COUNTED the planner's estimate will do."""

    @cached_property
    def count(self) -> int:  # type: ignore[override]
        table = self.object_list.model._meta.db_table  # type: ignore[attr-defined]
        counted = len(self.object_list.values_list("pk")[: COUNTED + 1])  # type: ignore[attr-defined]
        if counted <= COUNTED:
            return counted
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT greatest(sum(c.reltuples), 0)::bigint FROM pg_class c WHERE c.oid = to_regclass(%s)"
                " OR c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = to_regclass(%s))", [table, table],
            )  # fmt: skip
            row = cursor.fetchone()
        return max(int(row[0]) if row else 0, counted)


class ReadOnlyAdmin(ModelAdmin):  # type: ignore[misc]
    """Looked at here, written by the store alone."""

    paginator = EstimatingPaginator
    show_full_result_count = False
    list_max_show_all = 0
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class BySource(admin.SimpleListFilter):
    title = "source"
    parameter_name = "source"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(str(source.pk), source.name) for source in Source.objects.all()[:100]]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.filter(source=self.value()) if self.value() else queryset


class ByAction(admin.SimpleListFilter):
    title = "action"
    parameter_name = "action"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return list(ACTIONS.items())

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.filter(action=self.value()) if self.value() else queryset


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin):
    list_display = ("id", "what", "table", "key", "committed_at", "short_record")
    list_filter = (BySource, ByAction)
    list_select_related = ("relation",)
    search_fields = ("key",)
    search_help_text = "A primary key value, exactly. The newest 30,000 messages are shown; a consumer's page searches further"
    fields = ("id", "what", "table", "key", "old_key", "committed_at", "commit_lsn", "commit_idx", "whole_record", "whole_changes", "unchanged")
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> Any:
        """The newest of the log, by its key: nothing else would end within a second on millions. One message is found anywhere."""
        found = super().get_queryset(request).filter(source__in=list(Source.objects.values_list("pk", flat=True)))
        if request.resolver_match is not None and request.resolver_match.url_name == "consumers_message_changelist":
            with connection.cursor() as cursor:
                cursor.execute("SELECT last_value FROM messages_id")
                row = cursor.fetchone()
            found = found.filter(pk__gt=(row[0] if row else 0) - SHOWN_BACK)
        return found

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        if search_term:
            queryset = queryset.filter(key=json.dumps([search_term], ensure_ascii=False))
        return queryset, False

    @display(description="Action")
    def what(self, message: Message) -> str:
        return pill(ACTIONS.get(message.action, message.action))

    @display(description="Table")
    def table(self, message: Message) -> str:
        return str(message.relation)

    @display(description="Record")
    def short_record(self, message: Message) -> str:
        return message.record if len(message.record) <= 120 else message.record[:120] + "…"

    @display(description="Record")
    def whole_record(self, message: Message) -> str:
        return _shown(message.record)

    @display(description="Changes (old values)")
    def whole_changes(self, message: Message) -> str:
        return _shown(message.changes) if message.changes else "–"


@admin.register(Parked)
class ParkedAdmin(ReadOnlyAdmin):
    list_display = ("first_id", "consumer", "why", "how_many", "deliver_count", "last_status", "last_error", "due_at", "parked_at")
    list_filter = ("consumer", "reason")
    list_select_related = ("consumer",)
    actions = ("retry", "discard")

    @display(description="Reason")
    def why(self, parked: Parked) -> str:
        return pill(parked.reason)

    @display(description="Messages")
    def how_many(self, parked: Parked) -> int:
        return len(parked.ids)

    def has_operate_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("consumers.operate_consumer")

    @admin.action(description="Try again now", permissions=["operate"])
    def retry(self, request: HttpRequest, chosen: Any) -> None:
        self._decide(request, chosen, "retry", lifecycle.retry, "to be tried again")

    @admin.action(description="Discard…", permissions=["operate"])
    def discard(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        """Asks first, with the exact count: a row may stand for many messages."""
        if is_confirmed(request):
            self._decide(request, chosen, "discard", lifecycle.discard, "discarded")
            return None
        counts: dict[str, int] = {}
        for parked in chosen:
            counts[str(parked.consumer)] = counts.get(str(parked.consumer), 0) + len(parked.ids)
        total = sum(counts.values())
        return ask(
            request, title="Discard messages", back=request.path, button=f"Discard {counted(total, 'message')}", details=list(counts.items()),
            question=f"Discard {counted(total, 'message')}? They are not delivered, and this cannot be taken back.",
        )  # fmt: skip

    def _decide(self, request: HttpRequest, chosen: Any, name: str, decide: Any, what: str) -> None:
        by_consumer: dict[Any, list[int]] = {}
        for parked in chosen:
            by_consumer.setdefault(parked.consumer, []).extend(parked.ids)
        total = 0
        for consumer, ids in by_consumer.items():
            count = decide(consumer.pk, ids)
            audit.record(name, consumer, count, ids=ids[:20])
            total += count
        tell_how_many(request, total, what)


@admin.register(Attempt)
class AttemptAdmin(ReadOnlyAdmin):
    list_display = ("at", "consumer", "message_id", "ok", "status", "error", "duration_ms", "deliver_count", "url")
    list_filter = ("consumer", "ok")
    list_select_related = ("consumer",)
    fields = ("at", "consumer", "message_id", "ok", "status", "error", "duration_ms", "deliver_count", "url", "headers", "response")
    readonly_fields = fields


def _shown(text: str) -> str:
    return format_html('<pre class="sq-stored">{}</pre>', pretty(text))
