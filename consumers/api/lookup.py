"""Find what a path or a body names: an id or a name. What a token does not reach is not found."""
from __future__ import annotations

from typing import Any
from uuid import UUID

from rest_framework.exceptions import NotFound, PermissionDenied

from consumers.models import Consumer
from consumers.tokens import Caller


def find(model: Any, name_or_id: str) -> Any:
    """The object of `model` with this id or name. Raises NotFound."""
    found = by_name_or_id(model, name_or_id)
    if found is None:
        raise NotFound(f"there is no {model._meta.verbose_name} {name_or_id!r}")
    return found


def find_consumer(name_or_id: str, caller: Caller) -> Consumer:
    """The consumer with this id or name, if the caller's token reaches it. Raises NotFound."""
    consumer: Consumer = find(Consumer, name_or_id)
    if not caller.reaches(consumer.pk):
        raise NotFound(f"there is no consumer {name_or_id!r}")
    return consumer


def by_name_or_id(model: Any, name_or_id: str) -> Any:
    """The same, or None."""
    if "\0" in name_or_id:
        return None
    try:
        return model.objects.filter(pk=UUID(name_or_id)).first()
    except ValueError:
        return model.objects.filter(name=name_or_id).first()


def demand_all(caller: Caller) -> None:
    """A token limited to some consumers may not touch what all of them share."""
    if caller.consumers is not None:
        raise PermissionDenied("the token reaches only some consumers; this needs one that reaches all")
