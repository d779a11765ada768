"""Decide which addresses a push may reach: public ones, and networks the operator allowed. Pure.

Python's `is_global` lets the IPv6 forms pass that carry an IPv4 address inside (mapped, 6to4, Teredo, NAT64), so the inner
address is judged.
"""
from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.ip_network("::/96")
# Reserved ranges that `is_global` calls global in some Python versions.
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
        "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16",
    )
)  # fmt: skip


def is_allowed(text: str, allowed: Sequence[Network]) -> bool:
    """Whether a socket may be opened to this address (an IP address as text, a scope id is cut off)."""
    try:
        address = ipaddress.ip_address(text.split("%", 1)[0])
    except ValueError:
        return False
    if _within(address, allowed):
        return True
    inner = _inner(address)
    if inner is not None:
        return _within(inner, allowed) or (_is_public(inner) and getattr(address, "ipv4_mapped", None) is not None)
    return _is_public(address)


def _inner(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 one carries, if any."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in (*_NAT64, _COMPATIBLE)):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not _within(address, _NEVER)
