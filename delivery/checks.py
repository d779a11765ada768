"""System checks of what has to fit together."""
from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, register

LONGEST_ENDPOINT_S = 60


@register()
def task_times(app_configs: Any, **_: Any) -> list[CheckMessage]:
    """django-q2 kills a task at `timeout` and hands it out again at `retry`: both must outlast a pump's slice."""
    cluster = settings.Q_CLUSTER
    least = settings.PUMP_SLICE_S + LONGEST_ENDPOINT_S
    found: list[CheckMessage] = []
    if cluster["timeout"] <= least:
        found.append(Error(f"Q_CLUSTER timeout is {cluster['timeout']} s, a pump may take {least} s", id="delivery.E001"))
    if cluster["retry"] < 2 * cluster["timeout"]:
        found.append(Error(f"Q_CLUSTER retry is {cluster['retry']} s, expected at least twice the timeout", id="delivery.E002"))
    return found
