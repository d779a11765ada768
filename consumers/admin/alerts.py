"""Alerts: what fires, when, and who hears of it."""
from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from django import forms
from django.contrib import admin, messages
from django.core.mail import send_mail
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import URLPattern, path, reverse
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget, UnfoldAdminPasswordWidget, UnfoldAdminTextInputWidget

from consumers import audit, outbound
from consumers.admin.auditing import Audited
from consumers.admin.forms import KEEP
from consumers.admin.log import ReadOnlyAdmin
from consumers.admin.pages import ask, needs, posted
from consumers.alert_models import AlertDestination, AlertEpisode, AlertRule
from consumers.templatetags.console import pill
from consumers.words import duration, readable_bytes

CHANGE = "consumers.change_alertdestination"
TIMEOUT_S = 10.0


@admin.register(AlertRule)
class RuleAdmin(Audited):
    list_display = ("what", "enabled", "above", "lasting", "firing")
    fields = ("what", "enabled", "threshold", "unit_shown", "after_s")
    readonly_fields = ("what", "unit_shown")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    @display(description="When")
    def what(self, rule: AlertRule) -> str:
        return str(rule)

    @display(description="Unit of the threshold")
    def unit_shown(self, rule: AlertRule) -> str:
        return rule.unit or "this rule has none"

    @display(description="Threshold")
    def above(self, rule: AlertRule) -> str:
        if rule.threshold is None:
            return "–"
        return readable_bytes(rule.threshold) if rule.unit == "bytes" else f"{rule.threshold:,.0f} {rule.unit}"

    @display(description="For")
    def lasting(self, rule: AlertRule) -> str:
        return duration(rule.after_s)

    @display(description="Firing now")
    def firing(self, rule: AlertRule) -> str:
        return pill("firing") if rule.episodes.filter(ended_at=None).exclude(fired_at=None).exists() else "no"


class DestinationForm(forms.ModelForm):  # type: ignore[type-arg]
    url = forms.CharField(required=False, widget=UnfoldAdminPasswordWidget(render_value=False), label="URL", help_text=f"Of a webhook. {KEEP}")
    signing_secret = forms.CharField(
        required=False, widget=UnfoldAdminPasswordWidget(render_value=False), help_text=f"whsec_…: the webhook is then signed. {KEEP}"
    )

    class Meta:
        model = AlertDestination
        fields = ["name", "kind", "url", "signing_secret", "addresses", "rules", "enabled"]
        widgets = {"addresses": UnfoldAdminTextInputWidget(), "rules": UnfoldAdminCheckboxSelectMultipleWidget()}

    def clean_url(self) -> str:
        return self.cleaned_data["url"] or self.instance.url

    def clean_signing_secret(self) -> str:
        return self.cleaned_data["signing_secret"] or self.instance.signing_secret


@admin.register(AlertDestination)
class DestinationAdmin(Audited):
    form = DestinationForm
    list_display = ("name", "kind", "where", "enabled")
    actions_detail = ("test_alert",)

    def get_urls(self) -> list[URLPattern]:
        own = [path("<uuid:pk>/send-test/", self.admin_site.admin_view(send_test), name="consumers_alertdestination_send_test")]
        return [*own, *super().get_urls()]

    @display(description="Where")
    def where(self, destination: AlertDestination) -> str:
        if destination.kind == "email":
            return destination.addresses
        return destination.url.partition("://")[2].partition("/")[0]  # the rest may be a secret

    @action(description="Send a test alert", url_path="test", permissions=["change"])
    def test_alert(self, request: HttpRequest, object_id: str) -> HttpResponse:
        destination = get_object_or_404(AlertDestination, pk=object_id)
        return ask(
            request, title="Send a test alert", button="Send it", question=f"Send a test alert to {destination.name}?",
            back=_settings(destination), action=reverse("admin:consumers_alertdestination_send_test", args=[destination.pk]),
        )  # fmt: skip


@admin.register(AlertEpisode)
class EpisodeAdmin(ReadOnlyAdmin):
    list_display = ("state_shown", "subject", "rule", "text", "began_at", "ended_at", "told")
    list_display_links = None
    list_filter = ("rule",)
    search_fields = ("subject",)

    @display(description="State")
    def state_shown(self, episode: AlertEpisode) -> str:
        return pill(episode.state)

    @display(description="Told")
    def told(self, episode: AlertEpisode) -> str:
        listed = [
            f"{one.destination.name}{' (over)' if one.over else ''}{'' if one.sent_at else ': ' + (one.error or 'not yet')}"
            for one in episode.notices.select_related("destination").order_by("id")
        ]
        return "; ".join(listed) or "nobody"


@posted
@needs(CHANGE)
def send_test(request: HttpRequest, pk: UUID) -> HttpResponse:
    destination = get_object_or_404(AlertDestination, pk=pk)
    text = "A test alert from Sequin: this destination works."
    problem = ""
    if destination.kind == "email":
        try:
            send_mail("Test alert from Sequin", text, settings.DEFAULT_FROM_EMAIL, destination.recipients())
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
    else:
        body = {"text": text} if destination.kind == "slack" else {"type": "alert.test", "text": text}
        outcome = outbound.sender()(
            url=destination.url, body=json.dumps(body).encode(), timeout_s=TIMEOUT_S, secrets=destination.signing_secret, webhook_id="alert_test"
        )
        problem = "" if outcome.ok else outcome.error or "failed"
    audit.record("send_test", destination)
    if problem:
        messages.error(request, f"{destination.name}: {problem}")
    else:
        messages.success(request, f"Sent to {destination.name}.")
    return redirect(_settings(destination))


def _settings(destination: AlertDestination) -> str:
    return reverse("admin:consumers_alertdestination_change", args=[destination.pk])
