"""The index's rows as values."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, select

from narseal.errors import Refused
from narseal.nix.compression import COMPRESSIONS
from narseal.nix.content_address import ContentAddress
from narseal.nix.hashes import Hash
from narseal.nix.keys import Signature
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import Entry, parse_at
from narseal.nix.store_path import References, StorePath
from narseal.runtime.threads import by_size
from narseal.storage import schema


@dataclass(frozen=True, slots=True)
class NarRecord:
    """A file name below nar/ and what it stands for."""

    file: str
    nar_hash: Hash
    nar_size: int
    compression: str
    #: Measured once `stored`; before that what the upstream says, or None.
    file_hash: Hash | None
    file_size: int | None
    upstream: str
    url: str
    stored: bool = False
    published_as: str | None = None
    #: When the stored bytes were last hashed (Unix time); None: not known.
    verified_at: float | None = field(default=None, compare=False)

    @classmethod
    def of(cls, info: NarInfo, upstream: str) -> NarRecord:
        """The record of an upstream's narinfo, named by file hash, or NAR hash if there is none."""
        return cls(
            file=file_name(info.file_hash or info.nar_hash, info.compression),
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            compression=info.compression,
            file_hash=info.file_hash,
            file_size=info.file_size,
            upstream=upstream,
            url=info.url,
        )

    @classmethod
    def from_file(cls, info: NarInfo, file: str, *, file_hash: Hash, file_size: int) -> NarRecord:
        """The record of a file that no upstream has: its hash and size were measured."""
        return cls(
            file=file,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            compression=info.compression,
            file_hash=file_hash,
            file_size=file_size,
            upstream="",
            url="",
        )


@dataclass(frozen=True, slots=True)
class PathRecord:
    """An admitted store path; `info.url` is the upstream's, never served."""

    info: NarInfo
    nar_file: str
    evidence: str
    withdrawn: bool = False
    #: Names of the operator's keys whose signatures it has, made or verified here.
    ours: frozenset[str] = frozenset()

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All that are served with it."""
        return self.info.signatures

    @property
    def message(self) -> bytes:
        """The text under the signatures."""
        return self.info.fingerprint()

    def signed(self, signatures: tuple[Signature, ...], ours: frozenset[str]) -> PathRecord:
        """The same path with these signatures instead."""
        return replace(self, info=self.info.with_signatures(signatures), ours=ours)


@dataclass(frozen=True, slots=True)
class RealisationRecord:
    """An admitted realisation, by the address at which it is asked for."""

    key: str
    entry: Entry
    evidence: str
    withdrawn: bool = False
    ours: frozenset[str] = frozenset()

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """All that are served with it."""
        return self.entry.signatures

    @property
    def message(self) -> bytes:
        """The text under the signatures."""
        return self.entry.fingerprint()

    def signed(self, signatures: tuple[Signature, ...], ours: frozenset[str]) -> RealisationRecord:
        """The same realisation with these signatures instead."""
        return replace(self, entry=self.entry.with_signatures(signatures), ours=ours)


def keys_of(evidence: str) -> frozenset[str]:
    """The names of the keys on whose signatures an admission rests; each of them is enough.

    Evidence ends in `signature NAME…` then: of an upstream, of an uploader, of the operator (in a
    rebuilt index, where there may be several).
    """
    _, word, names = evidence.rpartition("signature ")
    return frozenset(names.split(" ")) if word else frozenset()


def is_void(evidence: str, revoked: frozenset[str]) -> bool:
    """Whether an admission rests on revoked keys alone."""
    keys = keys_of(evidence)
    return bool(keys) and keys <= revoked


@dataclass(frozen=True, slots=True)
class Attestation:
    """A bundle over a statement; its bytes are in storage."""

    #: SHA-256 of the bundle.
    digest: bytes
    #: The file or NAR digest, of those asked about, that the statement covers.
    subject: bytes
    predicate_type: str
    #: Who signed it, when it was brought; None: narseal itself.
    signer: str | None
    #: Unix time.
    made_at: float


#: A path and the NAR that its narinfo names.
Admitted = tuple[PathRecord, NarRecord]

#: Paths with the NAR that their narinfo names; both tables hold NarHash and NarSize, once is enough.
PATHS = select(schema.path, *(c for c in schema.nar.c if c.name not in schema.path.c)).join(
    schema.nar, schema.path.c.nar_file == schema.nar.c.file
)


def file_name(file_hash: Hash, compression: str) -> str:
    """`<nix32>.nar<suffix>`, as Nix names it."""
    return f"{file_hash.nix32}.nar{COMPRESSIONS[compression]}"


def admitted_of(row: Row[Any], store_dir: str) -> Admitted:
    """A row of PATHS."""
    nar = nar_of(row)
    info = NarInfo(
        store_dir=store_dir,
        store_path=StorePath(row.hash_part, row.name),
        url=nar.url,
        compression=nar.compression,
        nar_hash=Hash("sha256", row.nar_hash),
        nar_size=row.nar_size,
        file_hash=nar.file_hash,
        file_size=nar.file_size,
        references=References.parse(row.refs),
        deriver=StorePath.parse(row.deriver) if row.deriver else None,
        signatures=signatures_of(row.signatures),
        ca=ContentAddress.parse(row.ca) if row.ca else None,
        extra=tuple((name, value) for name, value in json.loads(row.extra)),
    )
    return PathRecord(info, row.nar_file, row.evidence, row.withdrawn, names_of(row.ours)), nar


async def admitted_of_all(rows: Sequence[Row[Any]], store_dir: str) -> list[Admitted]:
    """Rows of PATHS; in a thread if they say much."""

    def made() -> list[Admitted]:
        return [admitted_of(row, store_dir) for row in rows]

    return await by_size(sum(len(row.refs) for row in rows), made)


def signatures_of(text: str) -> tuple[Signature, ...]:
    """The column of signatures."""
    return tuple(map(Signature.parse, filter(None, text.split("\n"))))


def names_of(text: str) -> frozenset[str]:
    """The column of names of keys."""
    return frozenset(filter(None, text.split("\n")))


def conflict(pinned: NarInfo, info: NarInfo) -> Refused:
    """Why an upstream's narinfo of a path is refused that is pinned to another."""
    return Refused(
        "conflict",
        f"{pinned.store_path} is pinned to NarHash {pinned.nar_hash} and an upstream"
        f" now says {info.nar_hash}; the pin holds",
    )


#: Columns, beside the key, of which the text under the signatures is made; by table.
TEXT = {
    schema.path.name: ("name", "nar_hash", "nar_size", "refs"),
    schema.realisation.name: ("body",),
}


def text_of(record: PathRecord | RealisationRecord) -> tuple[Any, ...]:
    """What a record has in those columns."""
    if isinstance(record, RealisationRecord):
        return (record.entry.with_signatures(()).render(),)
    info = record.info
    return info.store_path.name, info.nar_hash.digest, info.nar_size, info.references.text


def says(record: PathRecord | RealisationRecord) -> ColumnElement[bool]:
    """Rows of which the text under the signatures is the record's."""
    table = schema.realisation if isinstance(record, RealisationRecord) else schema.path
    columns = zip(TEXT[table.name], text_of(record), strict=True)
    same = [table.c[name] == value for name, value in columns]
    return and_(*same)


def still_says(record: PathRecord | RealisationRecord) -> ColumnElement[bool]:
    """The same, of those that are in force."""
    table = schema.realisation if isinstance(record, RealisationRecord) else schema.path
    return and_(~table.c.withdrawn, says(record))


def realisation_of(row: Row[Any]) -> RealisationRecord:
    """A row of `realisation`."""
    entry = parse_at(row.key, row.body).with_signatures(signatures_of(row.signatures))
    return RealisationRecord(row.key, entry, row.evidence, row.withdrawn, names_of(row.ours))


def realisation_values(record: RealisationRecord) -> dict[str, Any]:
    """The columns of `realisation`, as of now and not withdrawn."""
    return {
        "key": record.key,
        "body": record.entry.with_signatures(()).render(),
        "signatures": "\n".join(map(str, record.signatures)),
        "ours": "\n".join(sorted(record.ours)),
        "evidence": record.evidence,
        "admitted_at": time.time(),
        "withdrawn": False,
    }


def nar_of(row: Row[Any]) -> NarRecord:
    """A row with the columns of `nar`."""
    return NarRecord(
        file=row.file,
        nar_hash=Hash("sha256", row.nar_hash),
        nar_size=row.nar_size,
        compression=row.compression,
        file_hash=Hash("sha256", row.file_hash) if row.file_hash else None,
        file_size=row.file_size,
        upstream=row.upstream,
        url=row.url,
        stored=row.stored,
        published_as=row.published_as,
        verified_at=row.verified_at,
    )


def nar_values(nar: NarRecord) -> dict[str, Any]:
    """The columns of `nar`."""
    return {
        "file": nar.file,
        "nar_hash": nar.nar_hash.digest,
        "nar_size": nar.nar_size,
        "compression": nar.compression,
        "file_hash": nar.file_hash.digest if nar.file_hash else None,
        "file_size": nar.file_size,
        "upstream": nar.upstream,
        "url": nar.url,
        "stored": nar.stored,
        "published_as": nar.published_as,
        "verified_at": nar.verified_at,
    }


def path_values(record: PathRecord) -> dict[str, Any]:
    """The columns of `path`, as of now and not withdrawn."""
    info = record.info
    return {
        "hash_part": info.store_path.hash_part,
        "name": info.store_path.name,
        "nar_hash": info.nar_hash.digest,
        "nar_size": info.nar_size,
        "refs": info.references.text,
        "deriver": str(info.deriver) if info.deriver else None,
        "ca": str(info.ca) if info.ca else None,
        "signatures": "\n".join(map(str, info.signatures)),
        "ours": "\n".join(sorted(record.ours)),
        "extra": json.dumps(info.extra),
        "nar_file": record.nar_file,
        "evidence": record.evidence,
        "admitted_at": time.time(),
        "withdrawn": False,
    }
