"""Sources, endpoints and consumers in the console."""
from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import mark_safe
from unfold.admin import ModelAdmin
from unfold.decorators import action, display

from consumers import changes
from consumers.admin.forms import ConsumerForm, EndpointForm, RehearsingForm, SourceForm
from consumers.models import Consumer, HttpEndpoint, Source
from consumers.preflight import findings
from consumers.store import lifecycle
from consumers.store.models import ConsumerPosition, SourceEvent, SourceStatus

STATUS_LABELS = {
    "active": "success", "ok": "success", "paused": "warning", "connecting": "warning", "disabled": "danger", "failing": "danger",
    "gap": "danger", "slot_lost": "danger", "slot_missing": "danger", "slot_foreign": "danger", "publication_missing": "danger",
    "store_full": "danger", "unreachable": "warning", "slot_busy": "warning",
}  # fmt: skip


class ConfigurationAdmin(ModelAdmin):  # type: ignore[misc]
    """Saving and deleting go the one way, `consumers.changes`, with the same effects as in the API."""

    list_per_page = 50
    warn_unsaved_form = True

    def save_model(self, request: HttpRequest, obj: Any, form: RehearsingForm, change: bool) -> None:
        try:
            changes.save(obj, form.prepared)
        except ValidationError as error:  # what passed a moment ago fails now
            self.message_user(request, f"Not saved: {' '.join(error.messages)}", messages.ERROR)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        changes.delete(obj)

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        try:
            return super().delete_view(request, object_id, extra_context)  # type: ignore[no-any-return]
        except changes.InUse as error:
            self.message_user(request, str(error), messages.ERROR)
            return HttpResponseRedirect("../change/")

    def get_actions(self, request: HttpRequest) -> Any:
        actions = super().get_actions(request)
        actions.pop("delete_selected", None)  # it would go past the checks above
        return actions

    def set_status(self, request: HttpRequest, chosen: Any, status: str) -> None:
        """Change the status of each; what cannot be is said, the rest is done."""
        done = 0
        for thing in chosen:
            thing.status = status
            try:
                changes.save(thing)
                done += 1
            except ValidationError as error:
                self.message_user(request, f"{thing.name}: {' '.join(error.messages)}", messages.ERROR)
        self.message_user(request, f"{done} now {status}.")


@admin.register(Source)
class SourceAdmin(ConfigurationAdmin):
    form = SourceForm
    list_display = ("name", "where", "state", "reasons", "retained", "slot_name", "publication_name")
    search_fields = ("name", "host", "database")
    actions = ("check_chosen", "pause", "resume", "recover", "acknowledge_gap")
    actions_detail = ["check_one"]
    readonly_fields = ("state", "reasons", "retained", "events", "slot_created", "publication_created", "created_at")
    fieldsets = (
        (None, {"fields": ("name", "status")}),
        ("Connection", {"fields": (("host", "port"), "database", ("username", "password"), ("sslmode", "ssl_root_cert"))}),
        ("Replication", {"fields": (("slot_name", "publication_name"), "slot_failover", ("slot_created", "publication_created"))}),
        ("Now", {"fields": ("state", "reasons", "retained", "events", "created_at")}),
    )

    @display(description="Database")
    def where(self, source: Source) -> str:
        return f"{source.host}:{source.port}/{source.database}"

    @display(description="State", label=STATUS_LABELS)
    def state(self, source: Source) -> str:
        if lifecycle.gap(source.pk):
            return "gap"
        found = SourceStatus.objects.filter(pk=source.pk).first()
        return "paused" if source.status == "paused" else found.state if found else "connecting"

    @display(description="Reasons")
    def reasons(self, source: Source) -> str:
        found = SourceStatus.objects.filter(pk=source.pk).first()
        return "; ".join(filter(None, [lifecycle.gap(source.pk), *(found.reasons if found else [])])) or "–"

    @display(description="WAL kept on the source")
    def retained(self, source: Source) -> str:
        found = SourceStatus.objects.filter(pk=source.pk).first()
        return f"{found.retained_bytes / 1_048_576:.1f} MB" if found and found.retained_bytes is not None else "–"

    @display(description="What happened")
    def events(self, source: Source) -> str:
        found = SourceEvent.objects.filter(source=source.pk)[:20]
        lines = [
            format_html("{} {}{}{}", f"{event.at:%Y-%m-%d %H:%M:%S}", f"{event.table_name} " if event.table_name else "", event.text,
                        " → backfill" if event.backfill else "")
            for event in found
        ]  # fmt: skip
        return format_html_join(mark_safe("<br>"), "{}", ((line,) for line in lines)) if lines else "–"

    @admin.action(description="Pause (the slot keeps WAL on the source's disk meanwhile)")
    def pause(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "paused")

    @admin.action(description="Resume")
    def resume(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "active")

    @admin.action(description="Check: what is right and wrong, and the SQL that mends it")
    def check_chosen(self, request: HttpRequest, chosen: Any) -> None:
        for source in chosen:
            self._show_findings(request, source)

    @action(description="Check", url_path="check")
    def check_one(self, request: HttpRequest, object_id: str) -> HttpResponse:
        source = Source.objects.filter(pk=object_id).first()
        if source is not None:
            self._show_findings(request, source)
        return HttpResponseRedirect(reverse("admin:consumers_source_change", args=[object_id]))

    def _show_findings(self, request: HttpRequest, source: Source) -> None:
        found = findings(source)
        for finding in sorted(found, key=lambda finding: finding.ok):
            if finding.ok:
                continue
            level = messages.ERROR if finding.blocking else messages.WARNING
            self.message_user(request, f"{source.name}: {finding.text}" + (f"  —  {finding.sql}" if finding.sql else ""), level)
        good = sum(finding.ok for finding in found)
        self.message_user(request, f"{source.name}: {good} of {len(found)} findings are good.", messages.SUCCESS)

    @admin.action(description="Recover: make a lost or missing slot anew")
    def recover(self, request: HttpRequest, chosen: Any) -> None:
        for source in chosen:
            try:
                changes.recover(source)
                self.message_user(request, f"{source.name}: capture begins again. What happened meanwhile is shown as a gap.")
            except ValidationError as error:
                self.message_user(request, f"{source.name}: {' '.join(error.messages)}", messages.ERROR)

    @admin.action(description="Acknowledge the gap")
    def acknowledge_gap(self, request: HttpRequest, chosen: Any) -> None:
        count = sum(lifecycle.acknowledge_gap(source.pk) for source in chosen)
        self.message_user(request, f"{count} gaps acknowledged.")


@admin.register(HttpEndpoint)
class EndpointAdmin(ConfigurationAdmin):
    form = EndpointForm
    list_display = ("name", "url", "timeout_ms", "used_by")
    search_fields = ("name", "url")

    @display(description="Consumers")
    def used_by(self, endpoint: HttpEndpoint) -> str:
        return ", ".join(endpoint.consumers.values_list("name", flat=True)[:5]) or "–"


@admin.register(Consumer)
class ConsumerAdmin(ConfigurationAdmin):
    form = ConsumerForm
    list_display = ("name", "kind", "source", "state", "table_names", "waiting", "out", "parked", "dead")
    list_filter = ("kind", "status", "source")
    list_select_related = ("source",)
    search_fields = ("name",)
    actions = ("pause", "resume", "disable", "enable")
    actions_detail = ("pause_one", "resume_one")
    readonly_fields = ("waiting", "out", "parked", "dead", "created_at")
    autocomplete_fields = ("source", "endpoint")
    fieldsets = (
        (None, {"fields": (("name", "status"), ("source", "kind"))}),
        ("Which changes", {"fields": ("tables", "actions", "group_columns")}),
        ("Push", {"fields": (("endpoint", "path"), ("batch_size", "concurrency"))}),
        ("Delivery", {"fields": (("ack_wait_ms", "max_ack_pending"), ("max_deliver", "max_per_group"))}),
        ("Backlog", {"fields": (("waiting", "out"), ("parked", "dead"), "created_at")}),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.readonly_fields if obj is None else (*self.readonly_fields, "source", "kind")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if change:
            count = lifecycle.waiting(obj.pk)
            self.message_user(request, f"The change applies to {count} waiting messages, and to all that come.")

    @display(description="State", label=STATUS_LABELS)
    def state(self, consumer: Consumer) -> str:
        return consumer.status

    @display(description="Tables")
    def table_names(self, consumer: Consumer) -> str:
        return ", ".join(consumer.tables) or "all"

    @display(description="Waiting")
    def waiting(self, consumer: Consumer) -> str:
        count = lifecycle.waiting(consumer.pk, limit=10_000)
        return f"{count:,}" if count < 10_000 else "10,000 or more"

    @display(description="Out")
    def out(self, consumer: Consumer) -> int:
        return _position(consumer).out_count

    @display(description="Parked")
    def parked(self, consumer: Consumer) -> int:
        return _position(consumer).parked_count

    @display(description="Dead letters")
    def dead(self, consumer: Consumer) -> int:
        return _position(consumer).dead_count

    @admin.action(description="Pause: collect, deliver later")
    def pause(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "paused")

    @admin.action(description="Resume")
    def resume(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "active")

    @admin.action(description="Enable, from the end of the log on")
    def enable(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen.filter(status="disabled"), "active")

    @admin.action(description="Disable: drop what waits and what comes")
    def disable(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        """Shows what would be lost before anything is."""
        if request.POST.get("confirmed"):
            self.set_status(request, chosen, "disabled")
            return None
        listed = [(consumer, lifecycle.backlog(consumer.pk).undelivered) for consumer in chosen]
        context = {
            **self.admin_site.each_context(request), "title": "Disable consumers", "listed": listed,
            "total": sum(count for _, count in listed), "opts": self.model._meta,
        }  # fmt: skip
        return render(request, "consumers/confirm_disable.html", context)

    @action(description="Pause", url_path="pause")
    def pause_one(self, request: HttpRequest, object_id: str) -> HttpResponse:
        self.set_status(request, Consumer.objects.filter(pk=object_id), "paused")
        return HttpResponseRedirect(f"../../{object_id}/change/")

    @action(description="Resume", url_path="resume")
    def resume_one(self, request: HttpRequest, object_id: str) -> HttpResponse:
        self.set_status(request, Consumer.objects.filter(pk=object_id), "active")
        return HttpResponseRedirect(f"../../{object_id}/change/")


def _position(consumer: Consumer) -> ConsumerPosition:
    found = ConsumerPosition.objects.filter(pk=consumer.pk).first()
    return found or ConsumerPosition(out_count=0, parked_count=0, dead_count=0)
