"""Let the playground's receiver forget what it has shown when a key is erased."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from django.dispatch import receiver

from consumers.signals import key_erased
from delivery.models import Arrival


@receiver(key_erased)
def forget(source_id: UUID, table: str, **_: Any) -> None:
    """Everything that arrived of the table: an arrival may name the key anywhere, and these are a few, to look at only."""
    name = table.partition(".")[2]
    ids = [arrival.pk for arrival in Arrival.objects.all() if str(source_id) in arrival.body and name in arrival.body]
    Arrival.objects.filter(pk__in=ids).delete()
