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

PULL = ("/api/http_pull_consumers/", "/api/sequin_streams/")
ERRORS = {
    "400": "A parameter or the body is not what it should be.",
    "401": "No token, or one that is unknown, revoked or expired.",
    "403": "The token's scope does not go so far.",
    "404": "There is none, or the token does not reach it.",
    "409": "In use, or not in a state for that.",
    "413": "The body is larger than 1 MiB.",
    "422": "Fields that do not validate.",
    "429": "Too many at a time; Retry-After says when to come again.",
    "503": "The store is away; Retry-After says when to come again.",
}
METHODS = ("get", "post", "patch", "delete")


class BearerExtension(OpenApiAuthenticationExtension):
    """How the document describes tokens."""

    target_class = "consumers.tokens.TokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer"}


def with_errors(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Say of each call how it can fail. A hook of drf-spectacular: the views' exceptions are not in their signatures."""
    schemas = result["components"]["schemas"]
    schemas["Error"] = {"type": "object", "required": ["summary"], "properties": {"summary": {"type": "string"}}}
    schemas["Invalid"] = {
        "type": "object", "required": ["summary", "validation_errors"],
        "properties": {
            "summary": {"type": "string"},
            "validation_errors": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        },
    }  # fmt: skip
    for path, operations in result["paths"].items():
        for method, operation in operations.items():
            for status, words in ERRORS.items():
                if _may_fail(status, path, method):
                    shape = {"$ref": f"#/components/schemas/{'Invalid' if status == '422' else 'Error'}"}
                    operation["responses"].setdefault(status, {"description": words, "content": {"application/json": {"schema": shape}}})
    return result


def _may_fail(status: str, path: str, method: str) -> bool:
    match status:
        case "404":
            return "{" in path
        case "413":
            return method in ("post", "patch")
        case "409" | "422":
            return method != "get" and not path.startswith(PULL)
        case _:
            return True


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
