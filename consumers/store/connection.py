"""Raw psycopg connections to the store, for COPY, LISTEN and session locks; everything else uses Django's."""
from __future__ import annotations

from typing import Any

import psycopg
from django.db import connections


def store_connection(*, application_name: str = "sequin", **overrides: Any) -> psycopg.Connection[Any]:
    """Open a connection of its own to the store, autocommit unless told otherwise. The caller closes it."""
    return psycopg.connect(**{**store_parameters(application_name), **overrides})


def store_parameters(application_name: str) -> dict[str, Any]:
    """What psycopg needs to open such a connection."""
    parameters = connections["default"].get_connection_params()
    for django_only in ("cursor_factory", "context", "prepare_threshold", "pool", "assume_role"):
        parameters.pop(django_only, None)
    parameters.setdefault("connect_timeout", 10)
    parameters.update({"autocommit": True, "application_name": application_name})
    return parameters
