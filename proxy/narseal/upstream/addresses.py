"""Which addresses a redirect may lead to: public ones, whatever notation they come in."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

#: IPv6 networks whose addresses stand for the IPv4 address in their last 32 bits: IPv4-mapped and
#: IPv4-compatible (RFC 4291), translated (RFC 2765), NAT64 (RFC 6052, RFC 8215).
_EMBEDDING = [
    IPv6Network(text)
    for text in ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
]
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the 32 bits before the IPv4 address


def check_public(address: str) -> None:
    """OSError if a connection to this address is one that a redirect must not make."""
    found = ip_address(address.partition("%")[0])
    if not all(_is_public(each) for each in (found, *_embedded(found))):
        raise OSError(f"a redirect to {address}, which is not public; see redirect_origins")


def public_addresses(host: str, port: int) -> Iterator[tuple[str, int]]:
    """The public addresses of a host, resolved once, for a connection to just them. Blocks.

    OSError (socket.gaierror, if it does not resolve) if there is none.
    """
    refusal: OSError | None = None
    found = False
    for *_, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            check_public(str(where[0]))
        except OSError as error:
            refusal = error
        else:
            found = True
            yield str(where[0]), port
    if not found and refusal:
        raise refusal


def public_socket(address: Any) -> socket.socket:
    """A socket for a public address as getaddrinfo gives it; OSError for any other."""
    family, kind, protocol, _, where = address
    check_public(where[0])
    return socket.socket(family, kind, protocol)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not address.is_multicast


def _embedded(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, IPv4Address):
        return
    number = int(address)
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield from address.teredo
    if any(address in network for network in _EMBEDDING) or (number >> 32) & 0xFFFFFFFF in _ISATAP:
        yield IPv4Address(number & 0xFFFFFFFF)
