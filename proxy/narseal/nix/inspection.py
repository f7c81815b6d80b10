"""Looking into a NAR file while it passes: decode, parse, hash. It takes a core: call it off the loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from narseal.errors import ContentMismatch, Refused
from narseal.nix.compression import MAGIC, decompressor
from narseal.nix.content_address import Method
from narseal.nix.hashes import Hash
from narseal.nix.nar_reader import NarReader
from narseal.nix.narinfo import NarInfo
from narseal.nix.references import HashModulo, ReferenceScanner

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """The file's own hash and size; the content was what the narinfo says."""

    file_hash: Hash
    file_size: int
    #: No other NAR agrees with the narinfo's CA: it can speak for the content by itself.
    is_addressed: bool = False
    #: Hash parts of claimed references that do not occur in the NAR; empty unless it was scanned.
    missing: frozenset[str] = frozenset()


class _Digest(Protocol):
    def update(self, portion: bytes | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class Inspection:
    """One pass over one NAR file, held to a narinfo.

    With `scan`, the references that the narinfo claims are looked for. `on_plain` gets the
    decompressed pieces. Raises ContentMismatch, other Refused and MalformedNar from `feed` and
    `finish`.
    """

    def __init__(
        self,
        info: NarInfo,
        *,
        scan: bool = False,
        on_plain: Callable[[bytes], object] | None = None,
    ) -> None:
        self._info = info
        self._scanner = ReferenceScanner(info.references.hash_parts() if scan else ())
        self._on_plain = on_plain
        self._decoder = decompressor(info.compression)
        # an uncompressed file is the NAR: its hash is taken once
        self._file_hash: _Digest | None = None if info.compression == "none" else hashlib.sha256()
        self._file_size = 0
        self._head = b""
        self._contents = _contents_digest(info)
        self._whole = _whole_digest(info)
        on_contents = self._contents.update if self._contents else None
        self._reader = NarReader(max_size=info.nar_size, on_contents=on_contents)

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
            self._scanner.feed(piece)
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
        is_addressed = self._check_content_address(is_plain_file=summary.is_plain_file)
        digest = self._file_hash.digest() if self._file_hash else summary.nar_hash.digest
        file_hash = Hash("sha256", digest)
        return Measured(file_hash, self._file_size, is_addressed, self._scanner.missing)

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

    def _check_content_address(self, *, is_plain_file: bool) -> bool:
        """Whether the CA leaves no other content; ContentMismatch if this is not its content."""
        ca = self._info.ca
        if ca is None:
            return False
        found: tuple[bytes | None, ...]
        if isinstance(self._whole, HashModulo):
            found = self._whole.digests()
        elif self._whole:
            found = (self._whole.digest(),)
        elif self._contents:
            found = (self._contents.digest(),) if is_plain_file else ()
        else:  # git's, or NarHash, which was compared
            return ca.is_evidence
        if ca.hash.digest not in found:
            raise ContentMismatch(
                "ca-mismatch", f"{self._info.store_path}: the content is not that of its CA {ca}"
            )
        # in the place of itself anybody could have put zeros: the digest must say where it stood
        return ca.is_evidence and ca.hash.digest in found[:1]


def check_addressed(info: NarInfo, measured: Measured) -> None:
    """Refused if nothing but its CA speaks for a NAR, and another NAR could have the same one."""
    if not measured.is_addressed:
        raise Refused(
            "unsigned",
            f"{info.store_path}: nobody who is trusted signed it, and its CA {info.ca} leaves open"
            " what the NAR has where the path would name itself",
        )


def _contents_digest(info: NarInfo) -> _Digest | None:
    """For a CA that is over the contents of one file."""
    if info.ca and info.ca.method in (Method.TEXT, Method.FLAT):
        return hashlib.new(info.ca.hash.algorithm)
    return None


def _whole_digest(info: NarInfo) -> _Digest | HashModulo | None:
    """For a CA that is over the NAR, but is not simply NarHash."""
    if info.ca is None or info.ca.method is not Method.NAR:
        return None
    if info.refers_to_itself:
        return HashModulo(info.ca.hash.algorithm, info.store_path.hash_part)
    return None if info.ca.hash == info.nar_hash else hashlib.new(info.ca.hash.algorithm)


def regular_files(
    wanted: frozenset[bytes], file: BinaryIO, *, compression: str, nar_size: int
) -> frozenset[bytes]:
    """Which of some paths below its root are regular files of a NAR of `nar_size` bytes. Blocks.

    It is read no further than they are found. Raises as `Inspection` does.
    """
    found: set[bytes] = set()
    decoder = decompressor(compression)

    def note(path: bytes) -> None:
        if path in wanted:
            found.add(path)

    reader = NarReader(max_size=nar_size, on_file=note)
    while found != wanted and (data := file.read(_CHUNK)):
        for piece in decoder.feed(data):
            reader.feed(piece)
    return frozenset(found)


def inspect_file(info: NarInfo, file: BinaryIO, *, scan: bool = False) -> Measured:
    """Hold a whole file to a narinfo, from where it stands on. Blocks."""
    inspection = Inspection(info, scan=scan)
    while data := file.read(_CHUNK):
        inspection.feed(data)
    return inspection.finish()
