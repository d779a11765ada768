"""What the playground's receiver page has received. Nothing of the deliveries themselves: those are the store's."""
from __future__ import annotations

from django.db import models


class Arrival(models.Model):
    """One push that arrived at the receiver page."""

    at = models.DateTimeField(auto_now_add=True)
    webhook_id = models.TextField()
    body = models.TextField()

    class Meta:
        ordering = ["-id"]

    def __str__(self) -> str:
        return self.webhook_id
