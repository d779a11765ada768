"""Tell every process, on commit, that a piece of configuration changed: NOTIFY sequin_config. And this one, that a key was erased."""
from __future__ import annotations

from typing import Any

from django.db import connection
from django.db.models.signals import m2m_changed, post_delete, post_save
from django.dispatch import Signal, receiver

from consumers.models import ApiToken, Consumer, HttpEndpoint, Source

# A key was erased from the log; who keeps copies of messages erases them too. Arguments: source_id, table.
key_erased = Signal()

KINDS = {Source: "source", HttpEndpoint: "endpoint", Consumer: "consumer", ApiToken: "token"}


@receiver([post_save, post_delete])
def announce(sender: Any, instance: Any, **_: Any) -> None:
    """NOTIFY is transactional: it goes out with the commit, or not at all."""
    kind = KINDS.get(sender)
    if kind is not None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify('sequin_config', %s)", [f"{kind}:{instance.pk}"])


@receiver(m2m_changed, sender=ApiToken.consumers.through)
def announce_token(sender: Any, instance: Any, **_: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_notify('sequin_config', %s)", [f"token:{instance.pk}"])
