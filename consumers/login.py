"""Logging in to the console: failures are counted, and too many of them make one wait.

Counted in the store, so that every web process knows. By name and address together first, so that a stranger who guesses
does not lock the owner out; by address and by name alone with more patience.
"""
from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models
from django.utils import timezone
from unfold.forms import AuthenticationForm

from consumers import audit

WITHIN = timedelta(minutes=5)
PAIR, ADDRESS, NAME = 5, 30, 50  # failures within that time


class LoginFailure(models.Model):
    """One failed login; forgotten after an hour."""

    name = models.CharField(max_length=150)
    address = models.GenericIPAddressField(null=True)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        app_label = "consumers"
        default_permissions = ()
        indexes = [models.Index(fields=["at"], name="login_failure_at")]  # read by every login

    def __str__(self) -> str:
        return f"{self.name} {self.at}"


class LoginForm(AuthenticationForm):  # type: ignore[misc]
    """Refuses before the password is looked at when there were too many failures lately."""

    def clean(self) -> dict[str, Any]:
        name = str(self.cleaned_data.get("username") or "")[:150].replace("\0", "")
        address = self.request.META.get("REMOTE_ADDR") or None if self.request else None
        if has_failed_too_often(name, address):
            raise ValidationError(f"Too many failed logins. Try again in {int(WITHIN.total_seconds() // 60)} minutes.", code="throttled")
        try:
            found: dict[str, Any] = super().clean()
        except ValidationError:
            LoginFailure.objects.create(name=name, address=address)
            LoginFailure.objects.filter(at__lt=timezone.now() - timedelta(hours=1)).delete()
            with audit.acting("nobody", address):
                audit.record("login_failed", f"user {name}")
            raise
        LoginFailure.objects.filter(name=name, address=address).delete()
        return found


def has_failed_too_often(name: str, address: str | None) -> bool:
    recent = LoginFailure.objects.filter(at__gt=timezone.now() - WITHIN)
    return (
        recent.filter(name=name, address=address).count() >= PAIR
        or recent.filter(address=address).count() >= ADDRESS
        or recent.filter(name=name).count() >= NAME
    )
