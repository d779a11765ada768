"""API tokens: made here or with create_api_token; shown once."""
from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils import timezone
from unfold.decorators import display

from consumers import audit
from consumers.admin.auditing import Audited
from consumers.admin.pages import page
from consumers.models import ApiToken
from consumers.templatetags.console import pill
from consumers.tokens import new_secret


class TokenForm(forms.ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = ApiToken
        fields = ["name", "scope", "consumers", "rate_limit", "expires_at"]


@admin.register(ApiToken)
class ApiTokenAdmin(Audited):
    form = TokenForm
    list_display = ("name", "scope", "mask", "state", "last_used_at", "expires_at", "created_at")
    list_filter = ("scope",)
    search_fields = ("name",)
    filter_horizontal = ("consumers",)
    actions = ("revoke",)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            obj.plain, obj.token_hash, obj.prefix = new_secret()
        super().save_model(request, obj, form, change)

    def response_add(self, request: HttpRequest, obj: Any, post_url_continue: str | None = None) -> HttpResponse:
        """The token stands in this answer and nowhere else, no cookie and no session."""
        about = f"Whoever has this token may do what its scope, {obj.scope}, allows: Authorization: Bearer TOKEN."
        back = reverse("admin:consumers_apitoken_changelist")
        return page(request, "console/shown_once.html", f"Token {obj.name}", secret=obj.plain, about=about, back=back)

    @display(description="State")
    def state(self, token: ApiToken) -> str:
        if token.revoked_at:
            return pill("revoked")
        return pill("expired" if token.expires_at and token.expires_at <= timezone.now() else "valid")

    @admin.action(description="Revoke", permissions=["change"])
    def revoke(self, request: HttpRequest, chosen: Any) -> None:
        for token in chosen.filter(revoked_at=None):
            token.revoked_at = timezone.now()
            token.save(update_fields=["revoked_at"])  # not update(): every process has to hear of it
            audit.record("revoke", token)
        self.message_user(request, "Revoked.")
