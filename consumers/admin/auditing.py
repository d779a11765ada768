"""Pages whose saving and deleting stands in the audit log, where it does not go through `consumers.changes`."""
from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from unfold.admin import ModelAdmin

from consumers import audit


class Audited(ModelAdmin):  # type: ignore[misc]
    """Names of the fields changed, never their values: some are secrets."""

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        audit.record("change" if change else "create", obj, fields=form.changed_data)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        audit.record("delete", obj)
        super().delete_model(request, obj)

    def get_actions(self, request: HttpRequest) -> Any:
        actions = super().get_actions(request)
        actions.pop("delete_selected", None)  # each is deleted by its own page, which records it
        return actions
