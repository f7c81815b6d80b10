"""A body in its Content-Encoding (RFC 9110, section 8.4), held to a bound coded and decoded."""

from __future__ import annotations

from collections.abc import Callable

from narseal.errors import Refused
from narseal.nix.compression import CONTENT_ENCODINGS, decompressor


class EncodedBody:
    """Takes a body as it comes on the wire, and gives the decoded bytes to `write`.

    `limit` bounds the decoded bytes, and nearly so those on the wire: what codes to more than it was
    is no honest encoding. Refused("unsupported-compression", "too-large", "corrupt", "truncated").
    """

    def __init__(self, encoding: str, *, limit: int, write: Callable[[bytes], object]) -> None:
        name = encoding.strip().lower()
        if name not in CONTENT_ENCODINGS:
            raise Refused("unsupported-compression", f"Content-Encoding {encoding[:40]!a}")
        compression = CONTENT_ENCODINGS[name]
        #: Whether there is nothing to decode, so that `feed` takes no time.
        self.is_plain = compression == "none"
        self._decoder = decompressor(compression, small=True)
        self._limit = limit
        self._wire_limit = limit if self.is_plain else limit + limit // 64 + 4096
        self._write = write
        self._taken = 0
        #: Decoded bytes so far.
        self.size = 0

    def feed(self, data: bytes) -> None:
        """The next bytes on the wire."""
        self._taken += len(data)
        if self._taken > self._wire_limit:
            raise Refused("too-large", f"more than {self._limit} bytes")
        for piece in self._decoder.feed(data):
            self.size += len(piece)
            if self.size > self._limit:
                raise Refused("too-large", f"more than {self._limit} bytes when decoded")
            self._write(piece)

    def finish(self) -> None:
        """The body ended."""
        self._decoder.finish()
