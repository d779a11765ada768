"""Sources: the list, the settings, and where their pages are."""
from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import URLPattern, path, reverse
from unfold.decorators import display

from consumers import changes, health
from consumers.admin import connecting, erasing, source_page
from consumers.admin.configuration import ConfigurationAdmin
from consumers.admin.forms import SourceForm
from consumers.admin.pages import page
from consumers.words import readable_bytes
from consumers.models import Source
from consumers.store import counters
from consumers.store.models import SourceStatus
from consumers.templatetags.console import pill


@admin.register(Source)
class SourceAdmin(ConfigurationAdmin):
    form = SourceForm
    page_name = "admin:consumers_source_page"
    list_display = ("linked", "where", "state", "reasons", "retained", "slot_name", "publication_name")
    list_display_links = None
    search_fields = ("name", "host", "database")
    actions = ("pause", "resume", "recover", "acknowledge_gap")
    readonly_fields = ("slot_created", "publication_created", "created_at")
    fieldsets = (
        (None, {"fields": ("name", "status")}),
        ("Connection", {"fields": (("host", "port"), "database", ("username", "password"), ("sslmode", "ssl_root_cert"))}),
        ("Replication", {"fields": (("slot_name", "publication_name"), "slot_failover", ("slot_created", "publication_created"))}),
    )

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        own = [
            path("try/", view(connecting.check), name="consumers_source_try"),
            path("<uuid:pk>/", view(source_page.show), name="consumers_source_page"),
            path("<uuid:pk>/numbers/", view(source_page.numbers), name="consumers_source_numbers"),
            path("<uuid:pk>/check/", view(source_page.check), name="consumers_source_check"),
            path("<uuid:pk>/tables/", view(source_page.tables), name="consumers_source_tables"),
            path("<uuid:pk>/publish/", view(source_page.publish), name="consumers_source_publish"),
            path("<uuid:pk>/erase/", view(erasing.erase), name="consumers_source_erase"),
            path("<uuid:pk>/do/<slug:action>/", view(source_page.act), name="consumers_source_act"),
        ]
        return [*own, *super().get_urls()]

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        return connecting.add(request)

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """Asks whether slot and publication go along, where we made them: left alone, a slot fills the source's disk."""
        source = get_object_or_404(Source, pk=object_id)
        back = reverse(self.page_name, args=[source.pk])
        if not self.has_delete_permission(request, source):
            raise PermissionDenied
        users = list(source.consumers.order_by("name").values_list("name", flat=True)[:20])
        if users:
            self.message_user(request, f"{source.name} is used by {', '.join(users)}: delete these first", messages.ERROR)
            return redirect(back)
        if request.method != "POST":
            stored = counters.totals().get(source.pk)
            return page(
                request, "console/delete_source.html", "Delete a source", source=source, back=back, messages=stored.captured if stored else 0
            )
        try:
            changes.delete(source, drop_replication=request.POST.get("drop") == "1")
        except changes.InUse as error:
            self.message_user(request, str(error), messages.ERROR)
            return redirect(back)
        self.message_user(request, f"{source.name} is deleted.", messages.SUCCESS)
        return redirect("admin:consumers_source_changelist")

    def has_operate_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("consumers.operate_source")

    @display(description="Database")
    def where(self, source: Source) -> str:
        return f"{source.host}:{source.port}/{source.database}"

    @display(description="State")
    def state(self, source: Source) -> str:
        judged = health.sources(only=source.pk)
        return pill(judged[0].status if judged else "connecting")

    @display(description="Reasons")
    def reasons(self, source: Source) -> str:
        judged = health.sources(only=source.pk)
        return "; ".join(judged[0].reasons) if judged and judged[0].reasons else "–"

    @display(description="WAL kept on the source")
    def retained(self, source: Source) -> str:
        found = SourceStatus.objects.filter(pk=source.pk).first()
        return readable_bytes(found.retained_bytes) if found and found.retained_bytes is not None else "–"

    @admin.action(description="Pause (the slot keeps WAL on the source's disk meanwhile)", permissions=["operate"])
    def pause(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "paused")

    @admin.action(description="Resume", permissions=["operate"])
    def resume(self, request: HttpRequest, chosen: Any) -> None:
        self.set_status(request, chosen, "active")

    @admin.action(description="Recover: make a lost or missing slot anew", permissions=["operate"])
    def recover(self, request: HttpRequest, chosen: Any) -> None:
        for source in chosen:
            try:
                changes.recover(source)
                self.message_user(request, f"{source.name}: capture begins again. What happened meanwhile is shown as a gap.")
            except ValidationError as error:
                self.message_user(request, f"{source.name}: {' '.join(error.messages)}", messages.ERROR)

    @admin.action(description="Acknowledge the gap", permissions=["operate"])
    def acknowledge_gap(self, request: HttpRequest, chosen: Any) -> None:
        count = sum(changes.acknowledge_gap(source) for source in chosen)
        self.message_user(request, f"{count} gaps acknowledged.")
