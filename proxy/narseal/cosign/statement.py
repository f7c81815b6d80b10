"""In-toto statements: what a batch says, and what a stranger's statement may look like.

Formats: in-toto Statement v1, DSSE v1 (PAE), and narseal's predicate `urn:narseal:nix-store-path:v1`,
whose JSON Schema is docs/predicate.schema.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from binascii import a2b_base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from narseal.errors import Malformed, MalformedAttestation
from narseal.nix.bounded_json import load_json
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import StorePath

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "urn:narseal:nix-store-path:v1"
#: Stock cosign verifies no statement with more subjects.
MAX_SUBJECTS = 1024
#: Bytes of one statement.
MAX_BYTES = 16 << 20
_TYPE = "https://in-toto.io/Statement/v1"
#: What is verified: cosign attest-blob still makes the older one, of the same shape.
_TYPES = (_TYPE, "https://in-toto.io/Statement/v0.1")
_HEX = re.compile("[0-9a-f]{64}", re.ASCII)
_AUDIT = "narseal-audit-log:"
_AUDIT_NAME = re.compile(rf"{_AUDIT}[1-9][0-9]{{0,18}}", re.ASCII)


class Subject(NamedTuple):
    """A name and a SHA-256 digest."""

    name: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Statement:
    """A parsed in-toto statement."""

    subjects: tuple[Subject, ...]
    predicate_type: str
    predicate: dict[str, Any]

    @classmethod
    def parse(cls, data: bytes) -> Statement:
        """MalformedAttestation if the bytes are no statement of v1 or v0.1, or out of bounds.

        Subjects without a SHA-256 digest are no subjects to us.
        """
        tree = read_json(data, limit=MAX_BYTES, what="the statement")
        subjects = tree.get("subject") if isinstance(tree, dict) else None
        if not isinstance(subjects, list) or tree.get("_type") not in _TYPES:
            raise MalformedAttestation(f"not an in-toto statement of type {_TYPE}")
        predicate, kind = tree.get("predicate", {}), tree.get("predicateType")
        if not isinstance(predicate, dict) or not isinstance(kind, str):
            raise MalformedAttestation("the statement has no predicate, or none with a type")
        if not 1 <= len(subjects) <= MAX_SUBJECTS:
            raise MalformedAttestation(
                f"{len(subjects)} subjects; from 1 to {MAX_SUBJECTS} are verified"
            )
        found = [_subject(item) for item in subjects]
        return cls(tuple(s for s in found if s), kind, predicate)

    def covers(self, digest: bytes) -> bool:
        """Whether a SHA-256 digest is among the subjects."""
        return any(subject.digest == digest for subject in self.subjects)


def _subject(item: Any) -> Subject | None:
    digest = item.get("digest") if type(item) is dict else None
    if type(digest) is not dict:
        raise MalformedAttestation("a subject has no digest")
    if (text := digest.get("sha256")) is None:
        return None
    name = item.get("name", "")
    if type(text) is not str or not _HEX.fullmatch(text) or type(name) is not str:
        raise MalformedAttestation("a subject's sha256 is not 64 hex digits, or its name no text")
    return Subject(name, bytes.fromhex(text))


@dataclass(frozen=True, slots=True)
class AttestedPath:
    """A store path and the file whose content was held to it."""

    info: NarInfo
    file: str
    file_hash: Hash

    def digests(self) -> frozenset[bytes]:
        """The subjects that it gives: one for an uncompressed file, else two."""
        return frozenset((self.file_hash.digest, self.info.nar_hash.digest))

    def facts(self) -> dict[str, Any]:
        """What the predicate says of it: what the substituter's signature covers, and the file.

        Not the deriver: no signature covers it, and anybody on the way could have set it.
        """
        info = self.info
        return {
            "storePath": f"{info.store_dir}/{info.store_path}",
            "narHash": f"sha256:{info.nar_hash.nix32}",
            "narSize": info.nar_size,
            "references": sorted(f"{info.store_dir}/{path}" for path in info.references),
            "file": {"name": self.file, "sha256": self.file_hash.digest.hex()},
        }


@dataclass(frozen=True, slots=True)
class AuditHead:
    """How long a signer's audit log was, and the SHA-256 of its last line."""

    lines: int
    digest: bytes

    @property
    def subject(self) -> Subject:
        """As a statement anchors it."""
        return Subject(f"{_AUDIT}{self.lines}", self.digest)


def render(paths: Iterable[AttestedPath], heads: Iterable[AuditHead] = ()) -> bytes:
    """The statement of a batch; its subjects are each path's file digest and NAR digest.

    `heads` of audit logs are anchored in it as further subjects.
    """
    subjects: dict[bytes, str] = {}
    facts = []
    for path in paths:
        subjects.setdefault(path.file_hash.digest, f"nar/{path.file}")
        subjects.setdefault(path.info.nar_hash.digest, str(path.info.store_path))
        facts.append(path.facts())
    named = [Subject(name, digest) for digest, name in subjects.items()]
    named += [head.subject for head in heads]
    return render_statement(named, PREDICATE_TYPE, {"paths": facts})


def audit_heads(statement: Statement) -> list[AuditHead]:
    """The heads of audit logs that a statement anchors."""
    return [
        AuditHead(int(subject.name.removeprefix(_AUDIT)), subject.digest)
        for subject in statement.subjects
        if _AUDIT_NAME.fullmatch(subject.name)
    ]


def render_statement(
    subjects: Iterable[Subject], predicate_type: str, predicate: dict[str, Any]
) -> bytes:
    """An in-toto Statement v1 of any predicate type."""
    tree = {
        "_type": _TYPE,
        "subject": [{"name": s.name, "digest": {"sha256": s.digest.hex()}} for s in subjects],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    return json.dumps(tree, separators=(",", ":")).encode()


def check_own(data: bytes, *, store_dir: str) -> tuple[int, list[AuditHead]]:
    """A statement that narseal could have made of paths of its store, byte for byte.

    Returns how many paths it is of, and the heads that it anchors; MalformedAttestation if it is
    anything else.
    """
    statement = Statement.parse(data)
    paths = statement.predicate.get("paths")
    if statement.predicate_type != PREDICATE_TYPE or not isinstance(paths, list) or not paths:
        raise MalformedAttestation(f"not a statement of {PREDICATE_TYPE}")
    subjects: dict[bytes, str] = {}
    facts = []
    for item in paths:
        path, nar, file, name = _read_fact(item, store_dir)
        subjects.setdefault(file.digest, f"nar/{name}")
        subjects.setdefault(nar.digest, str(path))
        facts.append({field: item[field] for field in _FACTS})
    heads = audit_heads(statement)
    named = [Subject(name, digest) for digest, name in subjects.items()]
    named += [head.subject for head in heads]
    if render_statement(named, PREDICATE_TYPE, {"paths": facts}) != data:
        raise MalformedAttestation("the statement is not, byte for byte, as narseal makes it")
    return len(paths), heads


_FACTS = ("storePath", "narHash", "narSize", "references", "file")
_FILE_NAME = re.compile(r"[0-9a-z]{52}\.nar(\.[a-z0-9]{2,4})?", re.ASCII)


def _read_fact(item: Any, store_dir: str) -> tuple[StorePath, Hash, Hash, str]:
    """Store path, NAR hash, file hash and file name of what a statement says of one path."""
    try:
        if set(item) != set(_FACTS) or set(item["file"]) != {"name", "sha256"}:
            raise ValueError("other fields than narseal's")
        size, references, name = item["narSize"], item["references"], item["file"]["name"]
        found = [StorePath.parse(_below(t, store_dir)) for t in (item["storePath"], *references)]
        nar, file = Hash.parse(item["narHash"]), Hash.parse(f"sha256:{item['file']['sha256']}")
        if type(size) is not int or size < 0 or not _FILE_NAME.fullmatch(name):
            raise ValueError("a size or a file name that is none")
        if (str(nar), file.hex) != (item["narHash"], item["file"]["sha256"]):
            raise ValueError("a hash that is spelled otherwise")
        if nar.algorithm != "sha256" or references != sorted(set(references)):
            raise ValueError("a hash of another kind, or references out of order")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise MalformedAttestation(f"the statement says of a path: {error}") from error
    return found[0], nar, file, name


def _below(text: str, store_dir: str) -> str:
    if not text.startswith(f"{store_dir}/"):
        raise ValueError(f"{text[:100]!r} is not in {store_dir}")
    return text.removeprefix(f"{store_dir}/")


def contradictions(statement: Statement, info: NarInfo) -> list[str]:
    """What a statement of ours says otherwise than a narinfo, field by field; [] if it agrees.

    A statement that does not name the path says nothing of it, which is one contradiction.
    """
    if statement.predicate_type != PREDICATE_TYPE:
        return [f"the predicate is {statement.predicate_type[:100]}, not {PREDICATE_TYPE}"]
    paths = statement.predicate.get("paths")
    path = f"{info.store_dir}/{info.store_path}"
    named = [
        item
        for item in (paths if isinstance(paths, list) else [])
        if isinstance(item, dict) and item.get("storePath") == path
    ]
    if not named:
        return [f"the attestation does not name {path}"]
    wanted = AttestedPath(info, "", info.nar_hash).facts()
    fields = ("narHash", "narSize", "references")
    return [
        f"{field} is {str(item.get(field))[:200]} in the attestation and"
        f" {str(wanted[field])[:200]} in the narinfo"
        for item in named
        for field in fields
        if item.get(field) != wanted[field]
    ]


def read_json(data: bytes, *, limit: int, what: str) -> Any:
    """Any JSON value; MalformedAttestation names `what` if it is too large or none.

    None either is what two parsers read in two ways: a field that stands twice, a NaN.
    """
    if len(data) > limit:
        raise MalformedAttestation(f"{what} has more than {limit} bytes")
    try:
        return load_json(data, what=what)
    except Malformed as error:
        raise MalformedAttestation(str(error)) from error


def read_base64(text: str, name: str) -> bytes:
    """The bytes of a bundle's field, in the one way to write them; MalformedAttestation if it is another or none."""
    try:
        data = a2b_base64(text, strict_mode=True)
    except ValueError as error:  # characters beyond ASCII are no binascii.Error
        raise MalformedAttestation(f"the bundle's {name} is not base64") from error
    # strict as it is, Python passes over padding behind whole groups
    if len(text) != (len(data) + 2) // 3 * 4:
        raise MalformedAttestation(f"the bundle's {name} is not base64: its padding is too long")
    return data


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that an envelope's signature is over."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def envelope_digest(statement: bytes) -> bytes:
    """The SHA-256 that an envelope's signature over a statement is over."""
    return hashlib.sha256(pae(PAYLOAD_TYPE, statement)).digest()
