"""Finding store path hashes in a stream of bytes, and hashing a NAR modulo its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from narseal.nix.base32 import CHARS
from narseal.nix.store_path import HASH_LENGTH

_RUN = re.compile(f"{CHARS}{{{HASH_LENGTH},}}".encode())


class ReferenceScanner:
    """Which of some hash parts occur in what is fed, whatever the portions (Nix's `RefScanSink`)."""

    def __init__(self, hash_parts: Iterable[str]) -> None:
        self._wanted = {part.encode("ascii") for part in hash_parts}
        self._tail = b""

        self.found: set[str] = set()

    @property
    def missing(self) -> frozenset[str]:
        """Those that did not occur yet."""
        return frozenset(part.decode() for part in self._wanted)

    def feed(self, data: bytes) -> None:
        """Scan the next bytes."""
        if not self._wanted:
            return
        data = self._tail + data
        for run in _RUN.finditer(data):
            text = run.group()
            for at in range(len(text) - HASH_LENGTH + 1):
                part = text[at : at + HASH_LENGTH]
                if part in self._wanted:
                    self._wanted.discard(part)
                    self.found.add(part.decode())
        self._tail = data[-(HASH_LENGTH - 1) :]


class HashModulo:
    """A digest with every occurrence of `hash_part` blanked (Nix's `HashModuloSink`).

    So content is addressed that refers to itself. Nix's source means to hash the places of the
    occurrences behind that; Nix 2.34 does not (tests/vectors), other releases do. So there are two
    right digests, but only the one with the places leaves no other content: for the other one,
    anybody may blank some of the occurrences.
    """

    def __init__(self, algorithm: str, hash_part: str) -> None:
        self._digest = hashlib.new(algorithm)
        self._needle = hash_part.encode("ascii")
        self._held = b""
        self._offset = 0  # of the first held byte
        self._places: list[int] = []

    def update(self, portion: bytes | memoryview) -> None:
        """Hash the next bytes; the last few are held back until what follows is known."""
        data = self._held + portion
        start = 0
        while (at := data.find(self._needle, start)) >= 0:
            self._places.append(self._offset + at)
            self._digest.update(data[start:at] + bytes(HASH_LENGTH))
            start = at + HASH_LENGTH
        end = max(start, len(data) - (HASH_LENGTH - 1))
        self._digest.update(data[start:end])
        self._held = data[end:]
        self._offset += end

    def digests(self) -> tuple[bytes | None, bytes]:
        """The digest of all that was fed, with the places, None if there are none, and without."""
        self._digest.update(self._held)
        self._held = b""
        placed = self._digest.copy()
        for place in self._places:
            placed.update(f"|{place}".encode())
        return placed.digest() if self._places else None, self._digest.digest()
