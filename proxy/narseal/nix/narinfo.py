"""narinfo: parsed strictly from bytes into a value, and rendered from the value alone.

What two parsers could read differently must not reach a client under the operator's name, so
this one is stricter than Nix's: every field but `Sig` at most once, integers in plain ASCII
digits, hashes of sha256 only, printable ASCII only. Format: Nix manual, "Binary cache".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from narseal.errors import (
    MalformedContentAddress,
    MalformedHash,
    MalformedKey,
    MalformedNarInfo,
    MalformedStorePath,
)
from narseal.nix.compression import COMPRESSIONS
from narseal.nix.content_address import ContentAddress
from narseal.nix.fingerprint import fingerprint
from narseal.nix.hashes import Hash
from narseal.nix.keys import Signature
from narseal.nix.store_path import References, StorePath

#: Bounds on one narinfo.
MAX_BYTES = 1 << 20
MAX_REFERENCES = 20_000
MAX_SIGNATURES = 32
#: Signatures that are kept of others, so that there is room for the operator's.
MOST_BUT_OURS = 24
MAX_EXTRA = 32
#: Of a file or NAR, in bytes: what Nix and the index can count.
MAX_SIZE = (1 << 63) - 1

_INTEGER = re.compile(r"[0-9]{1,20}", re.ASCII)
_LINE = re.compile(rb"[!-9;-~]{1,64}: ?[ -~]*")
#: Good lines, in one go.
_LINES = re.compile(rb"(?:[!-9;-~]{1,64}+: [ -~]*+\n)*+")
_URL = re.compile(r"[!-~]{1,2048}", re.ASCII)
_UNKNOWN_DERIVER = "unknown-deriver"
_KNOWN = frozenset(
    [
        "StorePath",
        "URL",
        "Compression",
        "FileHash",
        "FileSize",
        "NarHash",
        "NarSize",
        "References",
        "Deriver",
        "CA",
    ]
)


@dataclass(frozen=True, slots=True)
class NarInfo:
    """One store path as a binary cache describes it."""

    store_dir: str
    store_path: StorePath
    url: str
    compression: str
    nar_hash: Hash
    nar_size: int
    file_hash: Hash | None = None
    file_size: int | None = None
    references: References = field(default_factory=References)
    deriver: StorePath | None = None
    signatures: tuple[Signature, ...] = ()
    ca: ContentAddress | None = None
    extra: tuple[tuple[str, str], ...] = ()
    #: `Sig` lines that were no signatures and were dropped.
    malformed_signatures: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.nar_hash.algorithm != "sha256":
            raise MalformedNarInfo("only sha256 is signed by Nix", field="NarHash")
        if self.file_hash and self.file_hash.algorithm != "sha256":
            raise MalformedNarInfo("only sha256 names a file", field="FileHash")
        if not 0 < self.nar_size <= MAX_SIZE:
            raise MalformedNarInfo(f"{self.nar_size} is no size", field="NarSize")
        if self.file_size is not None and not 0 <= self.file_size <= MAX_SIZE:
            raise MalformedNarInfo(f"{self.file_size} is no size", field="FileSize")
        if self.references.with_hash_part(self.store_path.hash_part) not in (None, self.store_path):
            raise MalformedNarInfo("two paths with the same hash part", field="References")
        if self.compression not in COMPRESSIONS:
            raise MalformedNarInfo(f"unknown: {self.compression[:40]!r}", field="Compression")

    @classmethod
    def parse(cls, data: bytes, *, store_dir: str = "/nix/store") -> NarInfo:
        """The value that `data` means; MalformedNarInfo with line and field if there is none."""
        return _Parser(data, store_dir).narinfo()

    @property
    def refers_to_itself(self) -> bool:
        """Whether its path is among its references."""
        return self.references.with_hash_part(self.store_path.hash_part) is not None

    def fingerprint(self) -> bytes:
        """The text under this path's signatures."""
        return fingerprint(
            self.store_dir, self.store_path, self.nar_hash, self.nar_size, self.references
        )

    def with_signatures(self, signatures: tuple[Signature, ...]) -> NarInfo:
        """The same path with these signatures instead."""
        return self if signatures == self.signatures else replace(self, signatures=signatures)

    def render(self, *, whole: bool = True) -> bytes:
        """The text, fields in the order in which Nix writes them.

        If not `whole`, without what may be left out and speaks of the file alone, or of nothing that
        a signature or a content address covers.
        """
        return rendered(
            path=self.store_path.full(self.store_dir),
            url=self.url,
            compression=self.compression,
            file_hash=self.file_hash if whole else None,
            file_size=self.file_size if whole else None,
            nar_hash=self.nar_hash,
            nar_size=self.nar_size,
            references=self.references.text,
            deriver=self.deriver if whole else None,
            signatures=sorted(self.signatures),
            ca=self.ca,
            extra=self.extra if whole else (),
        )


def rendered(
    *,
    path: str,
    url: str,
    compression: str,
    file_hash: object,
    file_size: int | None,
    nar_hash: object,
    nar_size: int,
    references: str,
    deriver: object,
    signatures: Iterable[object],
    ca: object,
    extra: Iterable[tuple[str, str]],
) -> bytes:
    """What a narinfo of these fields says: values, or their texts; what is None is left out."""
    lines = [f"StorePath: {path}", f"URL: {url}", f"Compression: {compression}"]
    if file_hash:
        lines.append(f"FileHash: {file_hash}")
    if file_size is not None:
        lines.append(f"FileSize: {file_size}")
    lines.append(f"NarHash: {nar_hash}")
    lines.append(f"NarSize: {nar_size}")
    lines.append(f"References: {references}")
    if deriver:
        lines.append(f"Deriver: {deriver}")
    lines.extend(f"Sig: {signature}" for signature in signatures)
    if ca:
        lines.append(f"CA: {ca}")
    lines.extend(f"{name}: {value}" for name, value in extra)
    return "\n".join([*lines, ""]).encode("ascii")


class _Parser:
    def __init__(self, data: bytes, store_dir: str) -> None:
        if len(data) > MAX_BYTES:
            raise MalformedNarInfo(f"{len(data)} bytes, over the bound of {MAX_BYTES}")
        if not data.endswith(b"\n"):
            raise MalformedNarInfo("does not end with a newline")
        self.store_dir = store_dir
        self.fields: dict[str, tuple[int, str]] = {}
        self.signatures: list[Signature] = []
        self.malformed_signatures = 0
        if not _LINES.fullmatch(data):
            self._complain(data)
        for number, line in enumerate(data[:-1].decode("ascii").split("\n"), 1):
            self._take(number, *line.split(": ", 1))

    @staticmethod
    def _complain(data: bytes) -> None:
        """Say which line is none, and why."""
        for number, line in enumerate(data[:-1].split(b"\n"), 1):
            if not _LINE.fullmatch(line):
                raise MalformedNarInfo(f"not `Name: value` in ASCII: {line[:80]!r}", line=number)
            if not _LINES.fullmatch(line + b"\n"):  # Nix takes the next line for the value
                name = line.decode("ascii").partition(":")[0]
                raise MalformedNarInfo("no space after the colon", line=number, field=name)

    def _take(self, number: int, name: str, value: str) -> None:
        if not value and name != "References":
            raise MalformedNarInfo("is empty", line=number, field=name)
        if name == "Sig":
            self._take_signature(number, value)
        elif name in self.fields:
            raise MalformedNarInfo("stands there twice", line=number, field=name)
        else:
            if len(self.fields) >= MAX_EXTRA + len(_KNOWN):
                raise MalformedNarInfo(f"more than {MAX_EXTRA} unknown fields", line=number)
            self.fields[name] = (number, value)

    def _take_signature(self, number: int, value: str) -> None:
        if len(self.signatures) + self.malformed_signatures >= MAX_SIGNATURES:
            raise MalformedNarInfo(f"more than {MAX_SIGNATURES}", line=number, field="Sig")
        try:
            signature = Signature.parse(value)
        except MalformedKey:
            self.malformed_signatures += 1
        else:
            if signature not in self.signatures:
                self.signatures.append(signature)

    def _text(self, name: str) -> str | None:
        return self.fields[name][1] if name in self.fields else None

    def _required(self, name: str) -> str:
        value = self._text(name)
        if value is None:
            raise MalformedNarInfo("is missing", field=name)
        return value

    def _integer(self, name: str) -> int | None:
        value = self._text(name)
        if value is None:
            return None
        if not _INTEGER.fullmatch(value):
            raise self._wrong(name, f"not an integer in ASCII digits: {value[:40]!r}")
        return int(value)

    def _wrong(self, name: str, message: str) -> MalformedNarInfo:
        line = self.fields[name][0] if name in self.fields else 0
        return MalformedNarInfo(message, line=line, field=name)

    def narinfo(self) -> NarInfo:
        name = "StorePath"
        try:
            store_path = StorePath.parse_full(self._required(name), self.store_dir)
            name = "NarHash"
            nar_hash = Hash.parse(self._required(name))
            name = "FileHash"
            file_hash = self._text(name)
            parsed_file_hash = Hash.parse(file_hash) if file_hash else None
            name = "Deriver"
            deriver = self._text(name)
            parsed_deriver = (
                StorePath.parse(deriver) if deriver and deriver != _UNKNOWN_DERIVER else None
            )
            name = "CA"
            ca = self._text(name)
            parsed_ca = ContentAddress.parse(ca) if ca else None
            name = "References"
            references = self._references()
        except (MalformedHash, MalformedStorePath, MalformedContentAddress) as error:
            raise self._wrong(name, str(error)) from error
        nar_size = self._integer("NarSize")
        if nar_size is None:
            raise MalformedNarInfo("is missing", field="NarSize")
        if not _URL.fullmatch(self._required("URL")):
            raise self._wrong("URL", "empty, too long, or with spaces")
        return NarInfo(
            store_dir=self.store_dir,
            store_path=store_path,
            url=self._required("URL"),
            compression=self._text("Compression") or "bzip2",
            nar_hash=nar_hash,
            nar_size=nar_size,
            file_hash=parsed_file_hash,
            file_size=self._integer("FileSize"),
            references=references,
            deriver=parsed_deriver,
            signatures=tuple(sorted(self.signatures)),
            ca=parsed_ca,
            extra=tuple((k, v) for k, (_, v) in self.fields.items() if k not in _KNOWN),
            malformed_signatures=self.malformed_signatures,
        )

    def _references(self) -> References:
        text = self._text("References") or ""
        if (count := text.count(" ") + 1) > MAX_REFERENCES:
            raise self._wrong("References", f"{count}, over the bound of {MAX_REFERENCES}")
        return References.parse(text)
