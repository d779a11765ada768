"""django-q2's broker on the store's Postgres, made to wait for NOTIFY instead of polling."""
from __future__ import annotations

from typing import Any

import psycopg
from django.db import connection
from django_q.brokers.orm import ORM

from consumers.store.connection import store_connection

WAIT_S = 1.0
CHANNEL = "sequin_broker"


class NotifyBroker(ORM):  # type: ignore[misc]
    """The ORM broker, but an empty queue costs one wait, and a new task is taken at once."""

    _listening: psycopg.Connection[Any] | None = None

    def enqueue(self, task: str) -> Any:
        key = super().enqueue(task)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [CHANNEL])
        return key

    def dequeue(self) -> Any:
        tasks = self._take()
        if not tasks:
            self._wait()
            tasks = self._take()
        return tasks

    def _take(self) -> Any:
        from django.utils import timezone
        from django_q.conf import Conf

        rows = self.get_connection().filter(key=self.list_key, lock__lt=timezone.now())[: Conf.BULK]
        # Compared and set: another cluster may have been faster.
        return [
            (row.pk, row.payload)
            for row in rows
            if self.get_connection().filter(id=row.id, lock=row.lock).update(lock=self.timeout(row))
        ]

    def _wait(self) -> None:
        try:
            if self._listening is None or self._listening.closed:
                self._listening = store_connection(application_name="sequin broker")
                self._listening.execute(f"LISTEN {CHANNEL}")
                return
            for _ in self._listening.notifies(timeout=WAIT_S, stop_after=1):
                return
        except psycopg.Error:
            if self._listening is not None:
                self._listening.close()
            raise
