"""Read what the stream brings from databases whose encoding is not UTF-8. Pure.

The server converts for us as long as it can. In a database without an encoding (SQL_ASCII) it does not, and where a value has no
equivalent in UTF-8 it refuses: then `reader` takes the bytes as they are stored, and Python's codecs read them. What they cannot
read is shown as `\\xff`, never an error. Source: PostgreSQL manual, "Character Set Support".
"""
from __future__ import annotations

import re

from capture.pgoutput import Relation
from consumers.encodings import readable

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte


def readable_json(value: bytes, codec: str) -> str:
    """As `readable`, and still JSON: what cannot be read stands inside its strings only."""
    return _ESCAPED_BYTE.sub(lambda found: rf"\\x{ord(found[0]) & 0xFF:02x}", value.decode(codec, "surrogateescape"))


def with_readable_names(relation: Relation, codec: str) -> Relation:
    """A decoded relation holds names as UTF-8 with other bytes escaped; here they are read in the encoding they came in."""

    def name(text: str) -> str:
        return readable(text.encode("utf-8", "surrogateescape"), codec)

    columns = tuple(column._replace(name=name(column.name)) for column in relation.columns)
    return relation._replace(schema=name(relation.schema), table=name(relation.table), columns=columns)
