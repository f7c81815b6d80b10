"""Looking into a NAR file while it passes: decode, parse, hash. Blocking; call it off the loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from narseal.errors import ContentMismatch
from narseal.nix.compression import MAGIC, decompressor
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.nar import NarReader
from narseal.nix.narinfo import NarInfo
from narseal.nix.references import HashModulo


@dataclass(frozen=True, slots=True)
class Measured:
    """The file's own hash and size; the content was what the narinfo says."""

    file_hash: Hash
    file_size: int


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class Inspection:
    """One pass over one NAR file, held to a narinfo.

    `on_plain` gets the decompressed pieces. Raises ContentMismatch, other Refused and
    MalformedNar from `feed` and `finish`.
    """

    def __init__(
        self, info: NarInfo, *, on_plain: Callable[[bytes], object] | None = None
    ) -> None:
        self._info = info
        self._on_plain = on_plain
        self._decoder = decompressor(info.compression)
        # an uncompressed file is the NAR: its hash is taken once
        self._file_hash: _Digest | None = (
            None if info.compression == "none" else hashlib.sha256()
        )
        self._file_size = 0
        self._head = b""
        self._content: _Digest | None = None
        self._whole: _Digest | None = None
        self._watch(info.ca)
        on_contents = self._content.update if self._content else None
        self._reader = NarReader(max_size=info.nar_size, on_contents=on_contents)

    def _watch(self, ca: ContentAddress | None) -> None:
        """Take the hash that the content address is over, beside the NAR's."""
        if ca is None:
            return
        own = self._info.store_path.hash_part
        if ca.method in (Method.TEXT, Method.FLAT):
            self._content = hashlib.new(ca.hash.algorithm)
        elif ca.method is Method.NAR and any(r.hash_part == own for r in self._info.references):
            self._whole = HashModulo(ca.hash.algorithm, own)
        elif ca.method is Method.NAR and ca.hash != self._info.nar_hash:
            self._whole = hashlib.new(ca.hash.algorithm)

    def feed(self, data: bytes) -> None:
        """The next bytes of the file."""
        self._file_size += len(data)
        self._check_magic(data)
        if self._file_hash:
            self._file_hash.update(data)
        for piece in self._decoder.feed(data):
            self._reader.feed(piece)
            if self._whole:
                self._whole.update(piece)
            if self._on_plain:
                self._on_plain(piece)

    def finish(self) -> Measured:
        """The whole file was fed: hold it to the narinfo."""
        self._decoder.finish()
        summary = self._reader.finish()
        info = self._info
        if (summary.nar_hash, summary.nar_size) != (info.nar_hash, info.nar_size):
            raise ContentMismatch(
                "content-mismatch",
                f"{info.store_path}: the NAR has hash {summary.nar_hash} and {summary.nar_size}"
                f" bytes, its narinfo says {info.nar_hash} and {info.nar_size}",
            )
        self._check_content_address(is_plain_file=summary.is_plain_file)
        digest = self._file_hash.digest() if self._file_hash else summary.nar_hash.digest
        return Measured(Hash("sha256", digest), self._file_size)

    def _check_magic(self, data: bytes) -> None:
        magic = MAGIC.get(self._info.compression, b"")
        if len(self._head) < len(magic):
            self._head += data[: len(magic) - len(self._head)]
            if not magic.startswith(self._head):
                raise ContentMismatch(
                    "wrong-compression",
                    f"{self._info.store_path}: the file is not {self._info.compression},"
                    f" it begins with {self._head.hex()}",
                )

    def _check_content_address(self, *, is_plain_file: bool) -> None:
        ca = self._info.ca
        digest = self._content or self._whole
        if ca is None or digest is None:
            return
        wrong_kind = self._content is not None and not is_plain_file
        if wrong_kind or digest.digest() != ca.hash.digest:
            raise ContentMismatch(
                "ca-mismatch", f"{self._info.store_path}: the content is not that of its CA {ca}"
            )
