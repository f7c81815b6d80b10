"""Inclusion proofs out of a tiled log, for an entry whose proof was lost on the way.

Formats: C2SP tlog-tiles and tlog-checkpoint; hashes as RFC 6962, section 2.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

_HASH = 32
_HEIGHT = 8
_WIDTH = 1 << _HEIGHT

#: Gives a file of the log by its name below the log's address, such as `tile/0/x001/234`.
Read = Callable[[str], bytes]


def entry(read: Read, index: int, size: int) -> bytes:
    """The entry at an index of a log of `size` entries; ValueError if it is not there."""
    data = read(_name("entries", index // _WIDTH, size))
    start = 0
    for _ in range(index % _WIDTH):
        start += 2 + int.from_bytes(data[start : start + 2], "big")
    length = int.from_bytes(data[start : start + 2], "big")
    found = data[start + 2 : start + 2 + length]
    if not length or len(found) < length:
        raise ValueError(f"the log's entries end before {index}")
    return found


def inclusion_proof(read: Read, index: int, size: int) -> list[bytes]:
    """The hashes that lead from the entry at `index` to the root of the first `size` entries.

    ValueError if a tile is shorter than its name says. The proof is not verified here.
    """
    if not 0 <= index < size:
        raise ValueError(f"the log has {size} entries, and no {index}")

    @cache
    def tile(level: int, number: int) -> bytes:
        return read(_name(str(level), number, size >> (level * _HEIGHT)))

    def root(start: int, count: int) -> bytes:
        """Of the `count` entries from `start` on, which is a multiple of the next power of two."""
        if count & (count - 1):
            half = 1 << (count.bit_length() - 1)
            return _node(root(start, half), root(start + half, count - half))
        level = count.bit_length() - 1
        bottom = level - level % _HEIGHT
        first, many = start >> bottom, 1 << (level - bottom)
        offset = first % _WIDTH * _HASH
        hashes = tile(bottom // _HEIGHT, first // _WIDTH)[offset : offset + many * _HASH]
        if len(hashes) != many * _HASH:
            raise ValueError("a tile of the log is cut off")
        return _fold([hashes[at : at + _HASH] for at in range(0, len(hashes), _HASH)])

    proof: list[bytes] = []
    start, count = 0, size
    while count > 1:
        half = 1 << ((count - 1).bit_length() - 1)
        if index < start + half:
            proof.append(root(start + half, count - half))
            count = half
        else:
            proof.append(root(start, half))
            start, count = start + half, count - half
    return proof[::-1]


def _name(kind: str, number: int, leaves: int) -> str:
    """A tile's name, partial where it is the last of `leaves` and not full."""
    path = f"{number % 1000:03}"
    rest = number // 1000
    while rest:
        path = f"x{rest % 1000:03}/{path}"
        rest //= 1000
    width = min(_WIDTH, leaves - number * _WIDTH)
    return f"tile/{kind}/{path}" + (f".p/{width}" if width < _WIDTH else "")


def _fold(hashes: list[bytes]) -> bytes:
    while len(hashes) > 1:
        hashes = [_node(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
