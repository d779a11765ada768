"""Alerts as configured and as they happened: rules, destinations, episodes, notices.

A rule that holds for something opens one episode; each destination hears of it once, and once more when it is over.
`delivery/alerting.py` judges and sends; `consumers/alert_rules.py` says what holds now.
"""
from __future__ import annotations

import uuid
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, validate_email
from django.db import models
from django.db.models.signals import post_migrate
from django.dispatch import receiver

from consumers.endpoint_rules import check_signing_secrets, check_url
from consumers.fields import EncryptedTextField

GIGABYTE = 10**9
# Kind → what it says, threshold, its unit, for how long it must hold in seconds.
KINDS: dict[str, tuple[str, float | None, str, int]] = {
    "source_failing": ("A source is down, has a gap, or lost its slot", None, "", 30),
    "retained_wal": ("A slot keeps much WAL on the source's disk", GIGABYTE, "bytes", 60),
    "capture_lag": ("Capture is behind its source", 300, "seconds", 60),
    "consumer_lag": ("A consumer's oldest undelivered message is old", 900, "seconds", 60),
    "consumer_failing": ("A consumer's messages fail", None, "", 300),
    "consumer_paused": ("A consumer is paused", None, "", 3600),
    "dead_letters": ("A consumer has dead letters", 0, "messages", 0),
    "disk": ("The store's disk is nearly full", 20, "percent free", 60),
}


class AlertRule(models.Model):
    """When to alert. One row a kind, made on the first start; a team tunes or turns off."""

    kind = models.CharField(max_length=20, unique=True, editable=False, choices=[(kind, row[0]) for kind, row in KINDS.items()])
    enabled = models.BooleanField(default=True)
    threshold = models.FloatField(null=True, blank=True, validators=[MinValueValidator(0)])
    after_s = models.IntegerField(default=0, validators=[MinValueValidator(0)], help_text="For how long it must hold, in seconds.")

    class Meta:
        app_label = "consumers"
        ordering = ["id"]
        default_permissions = ("view", "change")

    def __str__(self) -> str:
        return KINDS[self.kind][0] if self.kind in KINDS else self.kind

    @property
    def unit(self) -> str:
        return KINDS[self.kind][2]


class AlertDestination(models.Model):
    """Who hears of it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=63, unique=True)
    kind = models.CharField(max_length=7, choices=[("webhook", "webhook"), ("slack", "Slack-compatible webhook"), ("email", "e-mail")])
    url = EncryptedTextField(blank=True, default="", help_text="Of a webhook. Kept encrypted: Slack's URLs are secrets.")
    signing_secret = EncryptedTextField(blank=True, default="", help_text="whsec_…: a webhook is then signed as pushes are.")
    addresses = models.TextField(blank=True, default="", help_text="E-mail addresses, apart by commas.")
    rules: models.ManyToManyField[Any, Any] = models.ManyToManyField(AlertRule, blank=True, help_text="What it hears of. None: everything.")
    enabled = models.BooleanField(default=True)

    class Meta:
        app_label = "consumers"
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        if self.kind == "email":
            found = self.recipients()
            if not found:
                raise ValidationError({"addresses": "expected at least one e-mail address"})
            for address in found:
                try:
                    validate_email(address)
                except ValidationError:
                    raise ValidationError({"addresses": f"{address!r} is not an e-mail address"}) from None
            if not settings.EMAIL_CONFIGURED:
                raise ValidationError({"kind": "no mail server is set: EMAIL_URL=smtp://user:password@host:587 says which"})
        elif problem := check_url(self.url):
            raise ValidationError({"url": problem})
        elif self.signing_secret and (problem := check_signing_secrets(self.signing_secret)):
            raise ValidationError({"signing_secret": problem})

    def recipients(self) -> list[str]:
        return [address.strip() for address in self.addresses.split(",") if address.strip()]


class AlertEpisode(models.Model):
    """One time that a rule held for one thing, from its beginning to its end."""

    rule = models.ForeignKey(AlertRule, models.CASCADE, related_name="episodes")
    subject = models.CharField(max_length=120)
    text = models.TextField()
    began_at = models.DateTimeField()
    fired_at = models.DateTimeField(null=True)
    absent_since = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        app_label = "consumers"
        ordering = ["-id"]
        default_permissions = ("view",)
        constraints = [
            models.UniqueConstraint(fields=["rule", "subject"], condition=models.Q(ended_at=None), name="one_open_episode")
        ]  # fmt: skip

    def __str__(self) -> str:
        return f"{self.subject}: {self.rule}"

    @property
    def state(self) -> str:
        return "over" if self.ended_at else "firing" if self.fired_at else "pending"


class AlertNotice(models.Model):
    """What one destination is told of an episode: that it began, or that it is over."""

    episode = models.ForeignKey(AlertEpisode, models.CASCADE, related_name="notices")
    destination = models.ForeignKey(AlertDestination, models.CASCADE)
    over = models.BooleanField()
    due_at = models.DateTimeField()
    sent_at = models.DateTimeField(null=True)
    attempts = models.IntegerField(default=0)
    error = models.TextField(blank=True, default="")

    class Meta:
        app_label = "consumers"
        default_permissions = ("view",)
        constraints = [models.UniqueConstraint(fields=["episode", "destination", "over"], name="told_once")]
        indexes = [models.Index(fields=["due_at"], condition=models.Q(sent_at=None), name="notice_due")]  # read by the sender


@receiver(post_migrate)
def make_rules(sender: Any, using: str = "default", **_more: Any) -> None:
    """The rules there are, with their defaults; those that exist stay as they were tuned."""
    if getattr(sender, "name", "") != "consumers":
        return
    for kind, (_what, threshold, _unit, after_s) in KINDS.items():
        AlertRule.objects.using(using).get_or_create(kind=kind, defaults={"threshold": threshold, "after_s": after_s})
