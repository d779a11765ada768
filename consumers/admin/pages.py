"""What the console's own pages share: the frame, who may do what, and asking before something is lost."""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.shortcuts import render

from consumers.words import counted

VIEW, OPERATE, CONFIGURE = "consumers.view_consumer", "consumers.operate_consumer", "consumers.change_consumer"
OPERATE_SOURCE, CONFIGURE_SOURCE = "consumers.operate_source", "consumers.change_source"

View = Callable[..., HttpResponse]


def page(request: HttpRequest, template: str, title: str, **context: Any) -> HttpResponse:
    """A page of the console with its sidebar."""
    request.current_app = admin.site.name  # type: ignore[attr-defined]
    return render(request, template, {**admin.site.each_context(request), "title": title, **context})


def needs(permission: str) -> Callable[[View], View]:
    """Only for those who have the permission; others see Django's 403 page, nobody the login."""

    def wrap(view: View) -> View:
        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            if not request.user.has_perm(permission):
                raise PermissionDenied(f"this needs the permission {permission}: ask an admin for the role that has it")
            return view(request, *args, **kwargs)

        return guarded

    return wrap


def posted(view: View) -> View:
    """Only by POST: nothing is done by following a link."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        return view(request, *args, **kwargs) if request.method == "POST" else HttpResponseNotAllowed(["POST"])

    return guarded


def is_confirmed(request: HttpRequest) -> bool:
    return request.POST.get("confirmed") == "1"


def tell_how_many(request: HttpRequest, count: int, what: str) -> None:
    """How many messages were "discarded", say; there may be none left by the time somebody has decided."""
    if count:
        messages.success(request, f"{counted(count, 'message')} {what}.")
    else:
        messages.warning(request, f"Nothing {what}: what was chosen is under way at this moment, or done already.")


def ask(
    request: HttpRequest, *, title: str, question: str, button: str, back: str, details: list[tuple[str, Any]] | None = None,
    action: str = "",
) -> HttpResponse:  # fmt: skip
    """Ask before something happens that cannot be taken back. What was posted is posted again, confirmed; to `action`."""
    fields = [
        (name, value)
        for name, values in request.POST.lists()
        if name not in ("csrfmiddlewaretoken", "confirmed")
        for value in values
    ]  # fmt: skip
    return page(
        request, "console/ask.html", title, question=question, button=button, back=back, details=details or [], fields=fields,
        action=action or request.get_full_path(),
    )  # fmt: skip
