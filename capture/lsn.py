"""Read and write LSNs as Postgres prints them. Pure.

>>> format_lsn(0x16B374D848)
'16/B374D848'
>>> parse_lsn('16/B374D848') == 0x16B374D848
True
"""
from __future__ import annotations


def format_lsn(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Raises ValueError for anything but `HEX/HEX`."""
    high, slash, low = text.partition("/")
    if not slash:
        raise ValueError(f"expected an LSN such as 16/B374D848, got {text!r}")
    return int(high, 16) << 32 | int(low, 16)


def widen_xid(xid: int, near: int) -> int:
    """The 64-bit transaction id that ends in the 32 bits of `xid` and lies nearest to `near`.

    >>> widen_xid(5, 2**32 + 3) == 2**32 + 5
    True
    >>> widen_xid(2**32 - 1, 2**32 + 3) == 2**32 - 1
    True
    """
    wide = near & ~0xFFFFFFFF | xid
    if wide > near + 0x80000000:
        wide -= 1 << 32
    elif wide < near - 0x80000000:
        wide += 1 << 32
    return wide if wide >= 0 else xid
