"""API tokens: making them, and knowing a request by one.

A token is 32 random bytes; its SHA-256 is kept. Looking one up costs a dictionary access for a few seconds after the
first; `forget` empties that at once when the configuration changes.
"""
from __future__ import annotations

import hashlib
import ipaddress
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db.models.signals import pre_delete
from django.dispatch import receiver
from django.http import HttpRequest
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed, Throttled
from rest_framework.permissions import BasePermission

from consumers import audit
from consumers.models import ApiToken, Consumer
from consumers.lookups import Lookups

PREFIX = "sqn_"
USED_EVERY_S = 60.0
RANK = {"pull": 0, "manage": 1, "admin": 2}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what DRF calls the user. `consumers` None: all."""

    token_id: UUID
    name: str
    scope: str
    consumers: frozenset[UUID] | None
    expires_at: datetime | None
    rate_limit: int | None = None
    is_authenticated: bool = True

    def may(self, scope: str) -> bool:
        return RANK[self.scope] >= RANK[scope]

    def reaches(self, consumer_id: UUID) -> bool:
        return self.consumers is None or consumer_id in self.consumers


_callers: Lookups[Caller | None] = Lookups()  # by their token's hash
_used: dict[UUID, float] = {}
_buckets: dict[UUID, tuple[float, float]] = {}  # token → requests left, when counted
_lock = threading.Lock()


def new_secret() -> tuple[str, str, str]:
    """A token's plain text, its hash, and the beginning that is shown."""
    plain = PREFIX + secrets.token_urlsafe(32)
    return plain, _hash(plain), plain[:10]


def create_token(
    name: str, scope: str = "pull", consumers: list[Consumer] | None = None, rate_limit: int | None = None
) -> tuple[ApiToken, str]:
    """Make a token. Returns it and its plain text, which is not kept. Raises ValidationError."""
    plain, digest, prefix = new_secret()
    token = ApiToken(name=name, scope=scope, token_hash=digest, prefix=prefix, rate_limit=rate_limit)
    token.full_clean()
    token.save()
    token.consumers.set(consumers or [])
    audit.record("create", token, scope=scope)
    return token, plain


def find_caller(plain: str) -> Caller | None:
    """The caller whose token this is, None when there is none, or it is revoked or expired."""
    if not plain:
        return None
    caller = _callers.find(_hash(plain), _load)
    if caller is None or (caller.expires_at is not None and caller.expires_at <= timezone.now()):
        return None
    now = time.monotonic()
    if _used.get(caller.token_id, -USED_EVERY_S) + USED_EVERY_S <= now:
        _used[caller.token_id] = now
        ApiToken.objects.filter(pk=caller.token_id).update(last_used_at=timezone.now())
    return caller


@receiver(pre_delete, sender=Consumer)
def revoke_orphans(sender: Any, instance: Consumer, **_: Any) -> None:
    """Revoke the tokens that reach this consumer alone: with an empty list they would reach all."""
    limited = ApiToken.objects.filter(consumers=instance, revoked_at=None)
    alone = [token.pk for token in limited if token.consumers.count() == 1]
    ApiToken.objects.filter(pk__in=alone).update(revoked_at=timezone.now())


def forget() -> None:
    """Look every token up again: one was revoked or changed."""
    _callers.forget()


def recognise(request: Any) -> Caller:
    """Whose token the request carries. Raises DRF's AuthenticationFailed, and Throttled past the token's rate."""
    plain = token_of(request)
    if not plain:
        raise AuthenticationFailed("expected the header Authorization: Bearer TOKEN")
    caller = find_caller(plain)
    if caller is None:
        raise AuthenticationFailed("the token is unknown, revoked or expired")
    if caller.rate_limit is not None and not _admit(caller.token_id, caller.rate_limit, time.monotonic()):
        raise Throttled(detail=f"more than {caller.rate_limit} requests a second with this token: come again in 1 s")
    return caller


class TokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer TOKEN`."""

    def authenticate(self, request: Any) -> tuple[Caller, None]:
        caller = recognise(request)
        audit.acting_as(f"token {caller.name}", request.META.get("REMOTE_ADDR") or None)
        return caller, None

    def authenticate_header(self, request: Any) -> str:
        return "Bearer"


class ScopeRequired(BasePermission):
    """The caller's scope includes the view's `required_scope` (pull < manage < admin)."""

    def has_permission(self, request: Any, view: Any) -> bool:
        needed = getattr(view, "required_scope", "manage")
        self.message = f"the token's scope is {getattr(request.user, 'scope', 'none')}; this needs {needed}"
        return isinstance(request.user, Caller) and request.user.may(needed)


class ConsoleOrToken(BasePermission):
    """A console login, or any token that may manage."""

    def has_permission(self, request: Any, view: Any) -> bool:
        user = request.user
        if isinstance(user, Caller):
            return user.may("manage")
        return bool(user is not None and getattr(user, "is_staff", False))


def may_operate(request: HttpRequest, public: bool) -> bool:
    """Whether /health and /metrics are shown: on loopback, when public, or with a token that may manage."""
    address = request.META.get("REMOTE_ADDR", "")
    forwarded = "HTTP_X_FORWARDED_FOR" in request.META or "HTTP_FORWARDED" in request.META
    try:
        local = not address or ipaddress.ip_address(address).is_loopback
    except ValueError:
        local = False
    if public or (local and not forwarded):
        return True
    caller = find_caller(token_of(request))
    return caller is not None and caller.may("manage")


def token_of(request: HttpRequest) -> str:
    """The token a request carries, "" when it carries none."""
    kind, _, plain = request.META.get("HTTP_AUTHORIZATION", "").partition(" ")
    return plain.strip() if kind.lower() == "bearer" else ""


def _admit(token_id: UUID, rate: int, now: float) -> bool:
    """A token bucket that holds two seconds' worth of requests."""
    with _lock:
        left, at = _buckets.get(token_id, (2.0 * rate, now))
        left = min(2.0 * rate, left + (now - at) * rate)
        _buckets[token_id] = (left - 1 if left >= 1 else left, now)
    return left >= 1


def _hash(plain: str) -> str:
    return hashlib.sha256(plain.encode("utf-8", "replace")).hexdigest()


def _load(digest: str) -> Caller | None:
    token = ApiToken.objects.filter(token_hash=digest, revoked_at=None).first()
    if token is None:
        return None
    ids = frozenset(token.consumers.values_list("pk", flat=True))
    return Caller(token.pk, token.name, token.scope, ids or None, token.expires_at, token.rate_limit)
