"""Answer the pull API before all that Django does for pages: sessions, cookies, forms, their headers and the search for a URL.

That cost as much as handing out a message. The first middleware; what is not plainly a call of the pull API goes on, and
`delivery/urls.py` has the same views for it, and for the OpenAPI document.
"""
from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from consumers import audit


class PullShortcut:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        from delivery.urls import CALLS, PREFIXES  # views need the apps, which are loaded by now

        self._get_response = get_response
        self._prefixes = PREFIXES
        self._views = {name: view.as_view() for name, view in CALLS.items()}

    def __call__(self, request: HttpRequest) -> HttpResponse:
        parts = request.path_info.split("/")
        if len(parts) != 5 or parts[:2] != ["", "api"] or parts[2] not in self._prefixes or not parts[3] or parts[4] not in self._views:
            return self._get_response(request)
        request.get_host()  # refuses hosts that are not in ALLOWED_HOSTS
        with audit.acting("nobody", request.META.get("REMOTE_ADDR") or None):
            response: HttpResponse = self._views[parts[4]](request, consumer=parts[3])
        response.headers["Content-Length"] = str(len(response.content))
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
