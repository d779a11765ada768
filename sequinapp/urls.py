"""Where everything is served: console, API, operations, the playground's receiver."""
from __future__ import annotations

import reprlib

from django.contrib import admin
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.urls import include, path
from django.views.defaults import bad_request, page_not_found, server_error
from django.views.generic import RedirectView

from consumers.api.errors import mistake

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("admin/", admin.site.urls),
    path("api/", include("delivery.urls")),
    path("api/", include("consumers.api.urls")),
    path("receiver/", include("delivery.receiver.urls")),
    path("", include("delivery.urls_operations")),
    path("favicon.ico", lambda request: HttpResponse(status=204)),
]


def _in_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/")


def not_found(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    if _in_api(request):
        return JsonResponse({"summary": f"there is nothing at {request.path}"}, status=404)
    return page_not_found(request, exception)


def refused(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    if _in_api(request):
        return JsonResponse({"summary": _why_refused(request, exception)}, status=400)
    return bad_request(request, exception)


def _why_refused(request: HttpRequest, exception: Exception) -> str:
    if isinstance(exception, DisallowedHost):
        return f"this server does not answer to the host {reprlib.repr(request.META.get('HTTP_HOST', ''))}: ALLOWED_HOSTS names those it does"
    return "the request could not be read"


def failed(request: HttpRequest) -> HttpResponse:
    if _in_api(request):
        return mistake()
    return server_error(request)


handler404 = not_found
handler400 = refused
handler500 = failed
