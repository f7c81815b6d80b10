"""Turning a NAR into zstd while it passes inspection. Blocking; call it off the loop."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from narseal.nix.compression import zstd_compressor
from narseal.nix.hashes import Hash
from narseal.nix.inspection import Measured
from narseal.storage import storage_errors


class Recompression:
    """A sink for decompressed bytes that writes them as one zstd file."""

    def __init__(self, level: int, incoming: tuple[int, Path]) -> None:
        self._level = level
        self.descriptor, self.path = incoming
        self.restart()

    def restart(self) -> None:
        """Begin anew, with an empty file."""
        self._compressor = zstd_compressor(self._level)
        self._hash = hashlib.sha256()
        self._size = 0
        with storage_errors():
            os.ftruncate(self.descriptor, 0)

    def feed(self, data: bytes) -> None:
        """The next bytes of the NAR."""
        self._write(self._compressor.compress(data))

    def finish(self) -> Measured:
        """Close the frame; the new file's hash and size."""
        self._write(self._compressor.flush())
        return Measured(Hash("sha256", self._hash.digest()), self._size)

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        with storage_errors():
            while data:
                done = os.pwrite(self.descriptor, data, self._size)
                self._size += done
                data = data[done:]
