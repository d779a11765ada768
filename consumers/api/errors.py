"""Turn every error of the API into its answer: `{"summary": …}` and the right status. Never a 500 for bad input."""
from __future__ import annotations

import logging
from typing import Any

import psycopg_pool
from django.core.exceptions import PermissionDenied, RequestDataTooBig, SuspiciousOperation, ValidationError
from django.db import DatabaseError, InterfaceError, OperationalError
from django.http import Http404, HttpResponse, JsonResponse
from rest_framework import exceptions

from consumers.changes import InUse, errors_of
from consumers.source_connection import SourceUnreachable
from consumers.store.connection import why_away

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_048_576


class BadParameter(Exception):
    """A parameter that is not what it should be: 400."""


class Invalid(Exception):
    """Fields that do not validate: 422 with `validation_errors`."""

    def __init__(self, errors: dict[str, list[str]]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{field}: {' '.join(text)}" for field, text in errors.items()))


class TooMany(Exception):
    """Too many requests of a kind: 429; `retry_after_s` says when to come again."""

    def __init__(self, summary: str, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(summary)


def answer(error: Exception, context: Any = None) -> HttpResponse | None:
    """DRF's exception handler; also called by views of our own. None: not ours, let it fail."""
    if isinstance(error, BadParameter):
        return _say(400, str(error))
    if isinstance(error, (exceptions.NotAuthenticated, exceptions.AuthenticationFailed)):
        return _say(401, str(error.detail), headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, (exceptions.PermissionDenied, PermissionDenied)):
        return _say(403, str(getattr(error, "detail", "not allowed")))
    if isinstance(error, (exceptions.NotFound, Http404)):
        return _say(404, str(getattr(error, "detail", None) or error or "not found"))
    if isinstance(error, RequestDataTooBig):
        return _say(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    if isinstance(error, TooMany):
        return _say(429, str(error), headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, exceptions.Throttled):
        return _say(429, str(error.detail), headers={"Retry-After": "1"})
    if isinstance(error, InUse):
        return _say(409, str(error))
    if isinstance(error, Invalid):
        return _say(422, str(error)[:1000], validation_errors=error.errors)
    if isinstance(error, ValidationError):
        found = errors_of(error)
        if _is_in_use(error):
            return _say(409, "; ".join(" ".join(text) for text in found.values()))
        return answer(Invalid(found))
    if isinstance(error, SourceUnreachable):
        return _say(422, str(error), validation_errors={"host": [str(error)]})
    if isinstance(error, (OperationalError, InterfaceError, psycopg_pool.PoolTimeout, psycopg_pool.PoolClosed)):
        log.error("the store is away: %s", why_away(error))
        return _say(503, "the store is away; try again", headers={"Retry-After": "2"})
    if isinstance(error, DatabaseError) and "\\u0000" in repr(error):
        return _say(400, "a text may not contain a NUL character")
    if isinstance(error, exceptions.APIException):
        return _say(error.status_code, str(error.detail))
    if isinstance(error, SuspiciousOperation):
        return _say(400, "the request could not be read")
    return None


def mistake() -> HttpResponse:
    """What is said of an error that `answer` does not know."""
    return _say(500, "the server made a mistake; its log says more")


def _is_in_use(error: ValidationError) -> bool:
    if not hasattr(error, "error_dict"):
        return False
    return any(item.code == "in_use" for items in error.error_dict.values() for item in items)


def _say(status: int, summary: str, *, headers: dict[str, str] | None = None, **more: Any) -> HttpResponse:
    return JsonResponse({"summary": " ".join(summary.split()), **more}, status=status, headers=headers)
