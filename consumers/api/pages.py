"""Cursor pagination: `?cursor=` and `?limit=`, answered as `{"data": […], "next": "cursor or null"}`."""
from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db.models import Q, QuerySet

from consumers.api.errors import BadParameter

DEFAULT_LIMIT = 50
MAX_LIMIT = 500


def limit(given: Mapping[str, str]) -> int:
    """`limit`, 1 to 500, default 50."""
    text = given.get("limit")
    if not text:
        return DEFAULT_LIMIT
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= MAX_LIMIT:
        raise BadParameter(f"limit: expected a whole number from 1 to {MAX_LIMIT}, got {text!r}")
    return int(text)


def encode(*place: Any) -> str:
    """The cursor of a place: after what the next page begins."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def decode(given: Mapping[str, str]) -> list[Any] | None:
    """The place of `cursor`, None when none is given."""
    text = given.get("cursor")
    if not text:
        return None
    try:
        place = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        place = None
    if not isinstance(place, list):
        raise BadParameter("cursor: expected the `next` of an earlier answer")
    return place


def page(queryset: QuerySet[Any], given: Mapping[str, str]) -> tuple[list[Any], str | None]:
    """One page in order of creation, and the cursor of the next."""
    size, place = limit(given), decode(given)
    if place is not None:
        try:
            created_at, pk = datetime.fromisoformat(place[0]), UUID(place[1])
        except (ValueError, TypeError, IndexError, AttributeError):
            raise BadParameter("cursor: expected the `next` of an earlier answer") from None
        queryset = queryset.filter(Q(created_at__gt=created_at) | Q(created_at=created_at, pk__gt=pk))
    found = list(queryset.order_by("created_at", "pk")[: size + 1])
    if len(found) <= size:
        return found, None
    last = found[size - 1]
    return found[:size], encode(last.created_at.isoformat(), str(last.pk))
