"""The OpenAPI document and its page. Both open with a console login or a token that may manage."""
from __future__ import annotations

from typing import Any

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.views import SpectacularAPIView
from rest_framework.authentication import SessionAuthentication
from rest_framework.negotiation import DefaultContentNegotiation

from consumers.admin.pages import page
from consumers.tokens import ConsoleOrToken, TokenAuthentication

METHODS = ("get", "post", "patch", "delete")


class BearerExtension(OpenApiAuthenticationExtension):
    """How the document describes tokens."""

    target_class = "consumers.tokens.TokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer"}


class SchemaView(SpectacularAPIView):
    content_negotiation_class = DefaultContentNegotiation  # YAML, or JSON with ?format=json
    authentication_classes = [SessionAuthentication, TokenAuthentication]
    permission_classes = [ConsoleOrToken]


def docs(request: HttpRequest) -> HttpResponse:
    """The document as a page, made here: nothing is fetched from elsewhere."""
    if not request.user.is_authenticated or not request.user.is_staff:
        return redirect_to_login(request.get_full_path(), reverse("admin:login"))
    document = SchemaGenerator().get_schema(request=None, public=True)
    calls = [
        {"method": method.upper(), "path": path, **_call(operation, document)}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in METHODS
    ]
    return page(request, "consumers/api_docs.html", "API", info=document["info"], calls=calls)


def _call(operation: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    shape = document.get("components", {}).get("schemas", {}).get(body.get("$ref", "").rpartition("/")[2], body)
    fields = [
        {"name": name, "type": field.get("type", "object"), "about": field.get("description", "")}
        for name, field in shape.get("properties", {}).items()
        if not field.get("readOnly")
    ]
    return {
        "about": operation.get("description", ""),
        "parameters": [p for p in operation.get("parameters", []) if p["in"] == "query"],
        "fields": fields,
        "answers": ", ".join(operation.get("responses", {})),
    }
