"""Nix's base-32: its own alphabet, its own bit order (Nix manual, "Store Path Specification")."""

from __future__ import annotations

import base64
import re

from narseal.errors import MalformedHash

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"
#: A regular expression's character class of the alphabet.
CHARS = "[0-9a-df-np-sv-z]"

_TEXT = re.compile(f"{CHARS}*", re.ASCII)
_HEX32 = "0123456789abcdefghijklmnopqrstuv"
_TO_HEX32 = str.maketrans(ALPHABET, _HEX32)
_FROM_HEX32 = str.maketrans(_HEX32, ALPHABET)


def encoded_length(size: int) -> int:
    """Characters that `size` bytes take."""
    return (size * 8 + 4) // 5


def encode(data: bytes) -> str:
    """Bytes to nix32: the number they form, little-endian, most significant digit first."""
    chars = encoded_length(len(data))
    pad = -(5 * chars) % 8
    number = int.from_bytes(data, "little") << pad
    raw = base64.b32hexencode(number.to_bytes((5 * chars + pad) // 8, "big"))
    return raw[:chars].decode().lower().translate(_FROM_HEX32)


def decode(text: str, size: int) -> bytes:
    """nix32 to exactly `size` bytes; MalformedHash on another length, character or overflow bits."""
    if len(text) != encoded_length(size) or not _TEXT.fullmatch(text):
        raise MalformedHash(f"not {encoded_length(size)} nix32 characters: {text[:64]!r}")
    number = int(text.translate(_TO_HEX32), 32) if text else 0
    if number >> (8 * size):
        raise MalformedHash(f"nix32 with overflow bits: {text!r}")
    return number.to_bytes(size, "little")
