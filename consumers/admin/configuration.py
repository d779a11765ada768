"""What the lists and settings of sources, endpoints and consumers share."""
from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin
from unfold.decorators import display

from consumers import changes
from consumers.admin.forms import RehearsingForm

class ConfigurationAdmin(ModelAdmin):  # type: ignore[misc]
    """Saving and deleting go the one way, `consumers.changes`, with the same effects as in the API."""

    list_per_page = 50
    warn_unsaved_form = True
    page_name = ""  # the object's own page; "" when it has none besides its settings

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

    def response_change(self, request: HttpRequest, obj: Any) -> HttpResponse:
        """Back to the object's page, where one sees what the change does."""
        if self.page_name and not {"_continue", "_addanother", "_saveasnew"} & request.POST.keys():
            self.message_user(request, f"{obj} is saved.", messages.SUCCESS)
            return HttpResponseRedirect(reverse(self.page_name, args=[obj.pk]))
        return super().response_change(request, obj)  # type: ignore[no-any-return]

    @display(description="Name", ordering="name")
    def linked(self, thing: Any) -> str:
        return format_html('<a class="sq-link" href="{}">{}</a>', reverse(self.page_name, args=[thing.pk]), thing.name)

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
