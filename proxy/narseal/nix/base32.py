"""Nix's base-32: its own alphabet, its own bit order (Nix manual, "Store Path Specification")."""

from __future__ import annotations

import re
from functools import lru_cache

from narseal.errors import MalformedHash

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
#: A regular expression's character class of the alphabet.
CHARS = "[0-9a-df-np-sv-z]"

_TEXT = re.compile(f"{CHARS}*", re.ASCII)
_HEX32 = "0123456789abcdefghijklmnopqrstuv"
_TO_HEX32 = str.maketrans(ALPHABET, _HEX32)
_PAIRS = [high + low for high in ALPHABET for low in ALPHABET]


def encoded_length(size: int) -> int:
    """Characters that `size` bytes take."""
    return (size * 8 + 4) // 5


@lru_cache(4096)  # each hash of a path is written several times while it is admitted and published
def encode(data: bytes) -> str:
    """Bytes to nix32: the number they form, little-endian, most significant digit first."""
    chars = encoded_length(len(data))
    number = int.from_bytes(data, "little")
    tops = range((chars + 1) // 2 * 10 - 10, -1, -10)  # of two digits each
    return "".join([_PAIRS[number >> top & 1023] for top in tops])[-chars or None :]


def decode(text: str, size: int) -> bytes:
    """nix32 to exactly `size` bytes; MalformedHash on another length, character or overflow bits."""
    if len(text) != encoded_length(size) or not _TEXT.fullmatch(text):
        raise MalformedHash(f"not {encoded_length(size)} nix32 characters: {text[:64]!r}")
    number = int(text.translate(_TO_HEX32), 32) if text else 0
    if number >> (8 * size):
        raise MalformedHash(f"nix32 with overflow bits: {text!r}")
    return number.to_bytes(size, "little")
