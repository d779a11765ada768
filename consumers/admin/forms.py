"""Forms that save as the API does, and never show a secret."""
from __future__ import annotations

import json
from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from unfold.widgets import UnfoldAdminPasswordWidget, UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget

from consumers import changes
from consumers.models import Consumer, HttpEndpoint, Source

KEEP = "Never shown. Leave empty to keep what is saved."


def lines_of_headers(text: str, field: str) -> Any:
    """`name: value`, one a line, or a JSON object. Raises ValidationError at `field`, without the values."""
    text = text.strip()
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError:
            raise ValidationError({field: "is not a JSON object"}) from None
        return found if isinstance(found, dict) else {}
    headers = {}
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        name, colon, value = line.partition(":")
        if not colon:
            raise ValidationError({field: f"Line {number}: expected name: value."})
        headers[name.strip()] = value.strip()
    return headers


class RehearsingForm(forms.ModelForm):  # type: ignore[type-arg]
    """Does before saving what can fail elsewhere: on the source's server, above all. Its refusals show at their fields."""

    prepared: Any = None

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        if self.errors:
            return
        try:
            self.prepared = changes.rehearse(self.instance)
        except ValidationError as error:
            for field, messages in changes.errors_of(error).items():
                self.add_error(field if field in self.fields else None, messages)


class EditorWidget(UnfoldAdminTextareaWidget):  # type: ignore[misc]
    """A textarea that becomes a code editor where scripts run."""

    template_name = "console/editor.html"

    def __init__(self, language: str) -> None:
        super().__init__()
        self.language = language

    def get_context(self, name: str, value: Any, attrs: Any) -> dict[str, Any]:
        return {**super().get_context(name, value, attrs), "language": self.language}


class SourceForm(RehearsingForm):
    password = forms.CharField(required=False, widget=UnfoldAdminPasswordWidget(render_value=False), help_text=KEEP)

    class Meta:
        model = Source
        fields = [
            "name", "host", "port", "database", "username", "password", "sslmode", "ssl_root_cert", "slot_name",
            "publication_name", "status",
        ]  # fmt: skip

    def clean_password(self) -> str:
        return self.cleaned_data["password"] or self.instance.password


class EndpointForm(RehearsingForm):
    secret_headers = forms.CharField(
        required=False, widget=UnfoldAdminTextareaWidget(), help_text='{"authorization": "Bearer …"}. ' + KEEP + " {} removes them."
    )
    signing_secret = forms.CharField(
        required=False, widget=UnfoldAdminPasswordWidget(render_value=False),
        help_text=KEEP + " Two, apart by a space, while one is rotated.",
    )  # fmt: skip

    class Meta:
        model = HttpEndpoint
        fields = ["name", "url", "headers", "secret_headers", "signing_secret", "timeout_ms"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial["secret_headers"] = ""

    def clean_secret_headers(self) -> Any:
        text = self.cleaned_data["secret_headers"].strip()
        if not text:
            return self.instance.secret_headers
        try:
            return json.loads(text)
        except ValueError:
            raise ValidationError('expected an object such as {"authorization": "Bearer …"}') from None

    def clean_signing_secret(self) -> str:
        return self.cleaned_data["signing_secret"] or self.instance.signing_secret


class ConsumerForm(RehearsingForm):
    class Meta:
        model = Consumer
        fields = [
            "name", "source", "kind", "tables", "actions", "where", "transform", "group_columns", "endpoint", "path", "batch_size",
            "concurrency", "ack_wait_ms", "max_ack_pending", "max_deliver", "max_per_group", "max_backlog_bytes", "on_full", "status",
        ]  # fmt: skip
        widgets = {
            **{name: UnfoldAdminTextInputWidget() for name in ("tables", "actions", "group_columns")},
            "where": EditorWidget("sql"), "transform": EditorWidget("lua"),
        }  # fmt: skip
        help_texts = {
            "tables": "public.orders, public.* – apart by commas. Empty: all of the publication.",
            "actions": "Some of insert, update, delete, truncate.",
            "group_columns": "Messages that agree in these arrive in order. Empty: the primary key.",
        }
