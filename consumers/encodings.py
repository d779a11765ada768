"""Read names of databases whose encoding is not UTF-8. Pure.

The server refuses to convert what has no equivalent in UTF-8, and converts nothing in a database without an encoding (SQL_ASCII).
`convert_to(name, 'SQL_ASCII')` gives the bytes as they are stored, and Python's codecs read them. What they cannot read is shown
as `\\xff`, never an error. Source: PostgreSQL manual, "Character Set Support".
"""
from __future__ import annotations

import re

UTF8, SQL_ASCII = "UTF8", "SQL_ASCII"
_CODECS = {
    SQL_ASCII: "utf-8", UTF8: "utf-8", "EUC_JP": "euc_jp", "EUC_CN": "gb2312", "EUC_KR": "euc_kr", "EUC_JIS_2004": "euc_jis_2004",
    "KOI8R": "koi8_r", "KOI8U": "koi8_u", "LATIN5": "iso8859_9", "LATIN6": "iso8859_10", "LATIN7": "iso8859_13",
    "LATIN8": "iso8859_14", "LATIN9": "iso8859_15", "LATIN10": "iso8859_16",
}  # fmt: skip


def codec_of(encoding: str) -> str:
    """Python's codec for a server encoding. Of one that Python does not know, only ASCII is read."""
    if encoding in _CODECS:
        return _CODECS[encoding]
    if found := re.fullmatch(r"(WIN|LATIN|ISO_8859_)(\d+)", encoding):
        return ("cp" if found[1] == "WIN" else "iso8859_") + found[2]
    return "ascii"


def readable(value: bytes, codec: str) -> str:
    return value.decode(codec, "backslashreplace")
