"""Tell whether an append concerns a consumer, from the relation ids in the notice and the tables it named."""
from __future__ import annotations

from collections.abc import Sequence

from django.db import connection

_names: dict[int, str] = {}  # relation version → schema.table; versions never change


def concerns(relations: Sequence[int], tables: Sequence[str]) -> bool:
    """True when one of these relation versions is of one of `tables`. No relations, or no tables: any."""
    if not relations or not tables:
        return True
    missing = [relation for relation in relations if relation not in _names]
    if missing:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT id, schema_name || '.' || table_name FROM relation_version WHERE id = ANY (%s)", [missing]
            )
            _names.update(cursor.fetchall())
    for relation in relations:
        name = _names.get(relation)
        if name is None or name in tables or f"{name.split('.', 1)[0]}.*" in tables:
            return True
    return False
