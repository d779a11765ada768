"""The django-q2 task: one pump, for one slice."""
from __future__ import annotations

import os
import random
import signal

from django.conf import settings
from django.db import connection

from consumers.parent import die_with_parent
from delivery.push.pump import Pump

PUMP_TASK = "delivery.push.tasks.pump"


def pump() -> None:
    """Serve push consumers for a slice. The watcher enqueues the next one when this is over."""
    die_with_parent(signal.SIGKILL)
    parent = os.getppid()
    connection.close()  # nothing is inherited over a fork
    try:
        # Not all at the same time: one that ends leaves its consumers to the others meanwhile.
        Pump(stopping=lambda: os.getppid() != parent).run(settings.PUMP_SLICE_S * random.uniform(0.5, 1.0))
    finally:
        connection.close()
