"""Who did what, when, to what and to how many: kept for ever, changed by nobody.

Whoever acts is known for the length of a request or command (`acting_as`), so that the one path of console, API and
fixtures (`consumers.changes`) records by itself. A trigger in the store refuses to change or delete an entry.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from django.contrib.auth.signals import user_logged_in, user_logged_out
from django.db import models
from django.dispatch import receiver
from django.http import HttpRequest, HttpResponse

SERVICE = "the service"
SHOWN_CHARACTERS = 200
CONSOLE = "/admin/"


class Actor(NamedTuple):
    """`user admin`, `token ci`, `command loaddata`; and from which address."""

    name: str
    address: str | None = None


_actor: ContextVar[Actor] = ContextVar("actor", default=Actor(SERVICE))  # noqa: B039  (a tuple)


class AuditEntry(models.Model):
    """One thing done."""

    at = models.DateTimeField(auto_now_add=True)
    actor = models.CharField(max_length=SHOWN_CHARACTERS)
    address = models.GenericIPAddressField(null=True)
    action = models.CharField(max_length=40)
    subject = models.CharField(max_length=SHOWN_CHARACTERS)
    count = models.BigIntegerField(null=True)
    detail = models.TextField(blank=True, default="")

    class Meta:
        app_label = "consumers"
        ordering = ["-id"]
        verbose_name_plural = "audit log"
        default_permissions = ("view",)
        indexes = [models.Index(fields=["subject", "-id"], name="audit_subject")]  # read by the console: what happened to this

    def __str__(self) -> str:
        return f"{self.actor}: {self.action} {self.subject}"


def record(action: str, subject: Any, count: int | None = None, **detail: Any) -> None:
    """Keep that the present actor did this. Never give it a secret."""
    actor = _actor.get()
    AuditEntry.objects.create(
        actor=_cut(actor.name), address=actor.address, action=action, subject=_cut(name_of(subject)), count=count,
        detail=json.dumps(detail, ensure_ascii=False, default=str) if detail else "",
    )  # fmt: skip


def name_of(subject: Any) -> str:
    """`consumer orders` for a model's instance; a text is itself."""
    if isinstance(subject, models.Model):
        return f"{subject._meta.verbose_name} {subject}".replace("\0", "")
    return str(subject).replace("\0", "")


def acting_as(name: str, address: str | None = None) -> None:
    """From here on, in this request or command, this one acts."""
    _actor.set(Actor(name, address))


@contextmanager
def acting(name: str, address: str | None = None) -> Iterator[None]:
    token = _actor.set(Actor(name, address))
    try:
        yield
    finally:
        _actor.reset(token)


class ActorKnown:
    """Middleware: the console's user acts. An API token says so itself when it is recognised."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        address = request.META.get("REMOTE_ADDR") or None
        # Elsewhere cookies mean nothing: there a session is not even looked at.
        user = request.user if request.path.startswith(CONSOLE) else None
        name = f"user {user.get_username()}" if user is not None and user.is_authenticated else "nobody"
        with acting(name, address):
            return self._get_response(request)


@receiver(user_logged_in)
def _logged_in(sender: Any, request: HttpRequest | None, user: Any, **_: Any) -> None:
    address = request.META.get("REMOTE_ADDR") or None if request is not None else None
    with acting(f"user {user.get_username()}", address):
        record("login", f"user {user.get_username()}")


@receiver(user_logged_out)
def _logged_out(sender: Any, request: HttpRequest, user: Any, **_: Any) -> None:
    if user is not None:
        record("logout", f"user {user.get_username()}")


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
