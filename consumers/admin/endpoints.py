"""Endpoints: the list, the settings, and a test message."""
from __future__ import annotations

from uuid import UUID

from django.contrib import admin, messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import URLPattern, path, reverse
from unfold.decorators import action, display

from consumers import audit, changes, outbound
from consumers.admin.configuration import ConfigurationAdmin
from consumers.admin.forms import EndpointForm
from consumers.admin.pages import CONFIGURE, OPERATE, ask, needs, page, posted
from consumers.models import HttpEndpoint, new_signing_secret


@admin.register(HttpEndpoint)
class EndpointAdmin(ConfigurationAdmin):
    form = EndpointForm
    list_display = ("name", "url", "timeout_ms", "used_by")
    search_fields = ("name", "url")
    actions_detail = ("test_message", "signing")
    fieldsets = (
        (None, {"fields": ("name", "url", "timeout_ms")}),
        ("Headers", {"fields": ("headers", "secret_headers"), "description": "Sent with every push, besides those of Standard Webhooks."}),
        ("Signature", {"fields": ("signing_secret",)}),
    )

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        own = [
            path("<uuid:pk>/send-test/", view(send_test), name="consumers_httpendpoint_send_test"),
            path("<uuid:pk>/new-secret/", view(new_secret), name="consumers_httpendpoint_new_secret"),
        ]
        return [*own, *super().get_urls()]

    @display(description="Consumers")
    def used_by(self, endpoint: HttpEndpoint) -> str:
        return ", ".join(endpoint.consumers.values_list("name", flat=True)[:5]) or "–"

    # Links cannot do anything: the pages they open ask, and their buttons do.
    @action(description="Send a test message", url_path="test", permissions=["view"])
    def test_message(self, request: HttpRequest, object_id: str) -> HttpResponse:
        endpoint = get_object_or_404(HttpEndpoint, pk=object_id)
        return ask(
            request, title="Send a test message", button="Send it", question=f"Send a signed test message to {endpoint.url}?",
            back=_settings(endpoint), action=reverse("admin:consumers_httpendpoint_send_test", args=[endpoint.pk]),
        )  # fmt: skip

    @action(description="New signing secret", url_path="secret", permissions=["change"])
    def signing(self, request: HttpRequest, object_id: str) -> HttpResponse:
        endpoint = get_object_or_404(HttpEndpoint, pk=object_id)
        return ask(
            request, title="New signing secret", button="Make a new one", back=_settings(endpoint),
            question=f"Make a new signing secret for {endpoint.name}? It is shown once. The last one goes on being used beside it.",
            action=reverse("admin:consumers_httpendpoint_new_secret", args=[endpoint.pk]),
        )  # fmt: skip


@posted
@needs(OPERATE)
def send_test(request: HttpRequest, pk: UUID) -> HttpResponse:
    """One signed POST, now, through the same transport as pushes: the same addresses are refused."""
    endpoint = get_object_or_404(HttpEndpoint, pk=pk)
    outcome = outbound.send_test(endpoint, request.POST.get("path", "")[:2000])
    audit.record("send_test", endpoint, status=outcome.status)
    if outcome.ok:
        messages.success(request, f"{endpoint.name} answered {outcome.status} after {outcome.duration_ms:,} ms.")
    else:
        said = f" It said: {outcome.response[:300]}" if outcome.response else ""
        messages.error(request, f"{endpoint.name}: {outcome.error}, after {outcome.duration_ms:,} ms.{said}")
    return redirect(_settings(endpoint))


@posted
@needs(CONFIGURE)
def new_secret(request: HttpRequest, pk: UUID) -> HttpResponse:
    """Rotate: pushes are signed with the new secret and the last one, so that receivers can change over in peace."""
    endpoint = get_object_or_404(HttpEndpoint, pk=pk)
    made = new_signing_secret()
    endpoint.signing_secret = " ".join([made, *endpoint.signing_secret.split()[:1]])
    changes.save(endpoint)
    return page(
        request, "console/shown_once.html", "New signing secret", secret=made, back=_settings(endpoint),
        about=f"Pushes to {endpoint.name} are signed with this secret and the last one. The next new one ends the last one's time.",
    )  # fmt: skip


def _settings(endpoint: HttpEndpoint) -> str:
    return reverse("admin:consumers_httpendpoint_change", args=[endpoint.pk])
