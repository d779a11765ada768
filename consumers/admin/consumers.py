"""Consumers: the list, the settings, and where their pages are."""
from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import URLPattern, path, reverse
from unfold.decorators import display

from consumers import changes, health
from consumers.admin import consumer_page, creating, message_page, replay, rules
from consumers.admin.configuration import ConfigurationAdmin
from consumers.admin.forms import ConsumerForm
from consumers.admin.pages import ask, is_confirmed
from consumers.models import Consumer
from consumers.store import counters, lifecycle
from consumers.store.models import ConsumerPosition
from consumers.templatetags.console import pill
from consumers.words import counted


@admin.register(Consumer)
class ConsumerAdmin(ConfigurationAdmin):
    form = ConsumerForm
    page_name = "admin:consumers_consumer_page"
    list_display = ("linked", "kind", "source", "state", "table_names", "waiting", "parked", "dead")
    list_display_links = None
    list_filter = ("kind", "status", "source")
    list_select_related = ("source",)
    search_fields = ("name",)
    actions = ("pause", "resume", "disable", "enable")
    readonly_fields = ("created_at",)
    autocomplete_fields = ("source", "endpoint")
    fieldsets = (
        (None, {"fields": (("name", "status"), ("source", "kind"))}),
        ("Which changes", {"fields": ("tables", "actions", "where", "transform", "group_columns")}),
        ("Push", {"fields": (("endpoint", "path"), ("batch_size", "concurrency"))}),
        ("Delivery", {"fields": (("ack_wait_ms", "max_ack_pending"), ("max_deliver", "max_per_group"), ("max_backlog_bytes", "on_full"))}),
    )

    class Media:
        js = ("console/editor.js",)

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        own = [
            path("tables/", view(creating.tables), name="consumers_consumer_tables"),
            path("try-endpoint/", view(creating.try_endpoint), name="consumers_consumer_try_endpoint"),
            path("<uuid:pk>/", view(consumer_page.show), name="consumers_consumer_page"),
            path("try/", view(rules.try_new), name="consumers_consumer_try_new"),
            path("<uuid:pk>/try/", view(rules.try_saved), name="consumers_consumer_try"),
            path("<uuid:pk>/rules/", view(rules.save), name="consumers_consumer_rules"),
            path("<uuid:pk>/rewind/", view(replay.rewind), name="consumers_consumer_rewind"),
            path("<uuid:pk>/backfill/", view(replay.begin_backfill), name="consumers_consumer_backfill"),
            path("<uuid:pk>/republish/", view(replay.republish), name="consumers_consumer_republish"),
            path("<uuid:pk>/republish/look/", view(replay.look), name="consumers_consumer_republish_look"),
            path("<uuid:pk>/backfills/", view(replay.progress), name="consumers_consumer_backfills"),
            path("<uuid:pk>/backfills/<uuid:backfill>/<slug:action>/", view(replay.act), name="consumers_consumer_backfill_act"),
            path("<uuid:pk>/messages/", view(consumer_page.live), name="consumers_consumer_messages"),
            path("<uuid:pk>/numbers/", view(consumer_page.numbers), name="consumers_consumer_numbers"),
            path("<uuid:pk>/status/<slug:status>/", view(consumer_page.set_status), name="consumers_consumer_status"),
            path("<uuid:pk>/redrive/<slug:action>/", view(consumer_page.redrive), name="consumers_consumer_redrive"),
            path("<uuid:pk>/message/<int:message_id>/", view(message_page.show), name="consumers_consumer_message"),
            path("<uuid:pk>/message/<int:message_id>/history/", view(message_page.history), name="consumers_consumer_message_history"),
        ]
        return [*own, *super().get_urls()]

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        return creating.add(request)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """What the rows show besides, in one query each."""
        listed = super().get_changelist_instance(request)
        looks = counters.looks()
        judged = {one.name: one.status for one in health.consumers()}
        positions = {position.pk: position for position in ConsumerPosition.objects.all()}
        for consumer in listed.result_list:
            consumer.look = looks.get(consumer.pk)
            consumer.health = judged.get(consumer.name, consumer.status)
            consumer.place = positions.get(consumer.pk) or ConsumerPosition(out_count=0, parked_count=0, dead_count=0)
        return listed

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.readonly_fields if obj is None else (*self.readonly_fields, "source", "kind")

    def has_operate_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("consumers.operate_consumer")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if change:
            count = lifecycle.waiting(obj.pk)
            self.message_user(request, f"The change applies to {count:,} waiting messages, and to all that come.")

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """With the exact count of what goes with it."""
        consumer = get_object_or_404(Consumer, pk=object_id)
        if not self.has_delete_permission(request, consumer):
            return super().delete_view(request, object_id, extra_context)  # type: ignore[no-any-return]
        if request.method != "POST" or not is_confirmed(request):
            count = lifecycle.backlog(consumer.pk).undelivered
            return ask(
                request, title="Delete a consumer", back=reverse("admin:consumers_consumer_page", args=[consumer.pk]),
                question=f"Delete {consumer.name}, and with it {counted(count, 'undelivered message')}, its position and its history of attempts?",
                button="Delete it" if not count else f"Delete it and drop {counted(count, 'message')}",
            )  # fmt: skip
        changes.delete(consumer, discard=True)
        self.message_user(request, f"{consumer.name} is deleted.")
        return redirect("admin:consumers_consumer_changelist")

    @display(description="State")
    def state(self, consumer: Any) -> str:
        return pill(consumer.health)

    @display(description="Tables")
    def table_names(self, consumer: Consumer) -> str:
        return ", ".join(consumer.tables) or "all"

    @display(description="Waiting")
    def waiting(self, consumer: Any) -> str:
        if consumer.look is None or consumer.look.waiting is None:
            return "–"
        return f"{'≈ ' if consumer.look.waiting >= counters.EXACT_WAITING else ''}{consumer.look.waiting:,}"

    @display(description="Failing or blocked")
    def parked(self, consumer: Any) -> str:
        return f"{consumer.place.parked_count:,}"

    @display(description="Dead letters")
    def dead(self, consumer: Any) -> str:
        return f"{consumer.place.dead_count:,}"

    @admin.action(description="Pause: collect, deliver later", permissions=["operate"])
    def pause(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "paused")

    @admin.action(description="Resume", permissions=["operate"])
    def resume(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "active")

    @admin.action(description="Enable, from the end of the log on", permissions=["operate"])
    def enable(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen.filter(status="disabled"), "active")

    @admin.action(description="Disable: drop what waits and what comes", permissions=["change"])
    def disable(self, request: HttpRequest, chosen: Any) -> HttpResponse | None:
        """Shows what would be lost before anything is."""
        if request.POST.get("confirmed"):
            self.set_status(request, chosen, "disabled")
            return None
        listed = [(consumer, lifecycle.backlog(consumer.pk).undelivered) for consumer in chosen]
        total = sum(count for _, count in listed)
        return ask(
            request, title="Disable consumers", button=f"Disable and drop {counted(total, 'message')}", back=request.path,
            question=f"Disabling drops {counted(total, 'undelivered message')}, and whatever comes until the consumer is enabled again.",
            details=[(consumer.name, counted(count, "message")) for consumer, count in listed],
        )  # fmt: skip

