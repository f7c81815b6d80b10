"""What the signer decides: which requests are signed. It trusts nothing that the proxy says.

It rebuilds the text from typed values, looks for evidence itself, and writes each signature down
before it leaves. It blocks; the socket is `signer/lines.py`'s.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from narseal.config.signer import SignerConfig
from narseal.cosign.statement import MAX_BYTES, AuditHead, check_own
from narseal.custody import requests
from narseal.custody.file import FileKey
from narseal.custody.operator import open_cosign_key
from narseal.custody.requests import PathRequest, RealisationRequest
from narseal.custody.wire import number_of
from narseal.errors import ConfigError, Malformed, NarsealError, Refused
from narseal.nix.addressing import check_content_address
from narseal.nix.compression import is_file_name
from narseal.nix.inspection import check_addressed, inspect_file
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.name_globs import matches
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import BuildTraceEntry
from narseal.runtime.files import open_regular
from narseal.signer.audit import AuditLog
from narseal.signer.rate import Rate

_log = logging.getLogger(__name__)
_MAX_NAR = 1 << 40
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_REASON = 400


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks, as the kernel says."""

    uid: int
    pid: int


@dataclass(frozen=True, slots=True)
class Approved:
    """A request that is signed as soon as it is written down."""

    #: As the request has it.
    number: int
    key: str
    record: dict[str, Any]
    #: With a substituter key: the message. With a cosign key: the digest, or the statement.
    message: bytes
    kind: str


@dataclass(frozen=True, slots=True)
class ToHash:
    """A request that is approved once its file was hashed."""

    info: NarInfo
    file: str | None
    approved: Approved


class SigningRules:
    """The keys and the rules. ConfigError if a key or the log cannot be used."""

    def __init__(self, config: SignerConfig) -> None:
        self._config = config
        keys: list[_MessageKey] = [_open(item.url) for item in config.key]
        self._keys = {key.public.name: key for key in keys}
        self._cosign = {
            item.name: open_cosign_key(item.url, item.password_file) for item in config.cosign_key
        }
        if len(self._keys) < len(keys) or len(self._cosign) < len(config.cosign_key):
            raise ConfigError("two keys of the signer have the same name")
        if not self._keys and not self._cosign:
            raise ConfigError("there is no [[key]] and no [[cosign_key]]: nothing to sign with")
        if config.content and not config.storage:
            raise ConfigError("content needs storage: the signer hashes the files itself")
        self._trusted = KeyRing.of(config.trusted_keys, (key.public for key in keys))
        audit_key = FileKey.load(config.audit.key)
        if any(audit_key.public.data == key.public.data for key in keys):
            raise ConfigError(
                "audit.key is one of the substituter keys: it signs the audit log and nothing else;"
                " make another with `narseal key generate`"
            )
        self.audit = AuditLog(Path(config.audit.log), audit_key)
        self._rate = Rate(config.rate, config.per_day)

    def public_keys(self) -> list[dict[str, str]]:
        """What it signs with, for whoever asks."""
        return [
            *(
                {"name": name, "type": "ed25519", "public": str(key.public)}
                for name, key in self._keys.items()
            ),
            *(
                {"name": name, "type": "cosign", "public": key.public.render()}
                for name, key in self._cosign.items()
            ),
        ]

    def consider(self, tree: dict[str, Any], peer: Peer) -> Approved | ToHash:
        """Whether a request is signed, and with what record; Refused or Malformed say why not."""
        kind, name = tree.get("kind"), tree.get("key")
        if kind == "revocation":
            return self._consider_revocation(tree, peer)
        if kind in ("statement", "digest"):
            return self._consider_cosign(tree, str(kind), name, peer)
        if not isinstance(name, str) or name not in self._keys:
            raise Refused("signer-refused", f"there is no substituter key {str(name)[:60]!r}")
        request = requests.parse(tree, store_dir=self._config.store_dir)
        message = request.message
        if isinstance(request, PathRequest):
            evidence, needs_hash = self._evidence_of_path(request, message)
            info = request.info
            what = {
                "subject": f"{info.store_dir}/{info.store_path}",
                "digest": f"sha256:{info.nar_hash.digest.hex()}",
            }
        else:
            evidence, needs_hash = self._evidence_of_realisation(request, message), False
            what = {"subject": request.name, "digest": str(request.entry.out_path)}
        record: dict[str, Any] = {"kind": kind, **what, "key": name, "evidence": evidence}
        record |= _of(peer)
        approved = Approved(number_of(tree), name, record, message, str(kind))
        if needs_hash and isinstance(request, PathRequest):
            return ToHash(request.info, request.file, approved)
        return approved

    def allowance(self, most: int) -> int:
        """How many signatures the rate lets out now, up to `most`; they are taken from it.

        Unavailable if none does today any more.
        """
        return self._rate.take(most)

    def sign(self, approved: Sequence[Approved]) -> list[bytes | str]:
        """Write a group down, then sign it: signatures, or why one could not be made. Blocks.

        OSError if the log cannot be written: then nothing is signed.
        """
        self.audit.append([item.record for item in approved])
        outcomes: list[bytes | str] = []
        for item in approved:
            try:
                outcomes.append(self._signature(item))
            except NarsealError as error:  # a token that went away
                outcomes.append(str(error))
        return outcomes

    def refused(self, tree: Mapping[str, Any], peer: Peer, error: NarsealError) -> None:
        """Write down, in the program's log, what was not signed."""
        what = {"kind": str(tree.get("kind"))[:40], "key": str(tree.get("key"))[:80]}
        _log.warning("not signed: %s", str(error)[:_MAX_REASON], extra={**what, **_of(peer)})

    def close(self) -> None:
        """A last checkpoint; the keys are cleared."""
        self.audit.close()
        for key in self._keys.values():
            key.close()

    def _consider_revocation(self, tree: dict[str, Any], peer: Peer) -> Approved:
        """Written down and no more: a proxy that was taken over must not end a good key."""
        texts = [tree.get(name) for name in ("of", "name", "reason")]
        if set(tree) != {"id", "kind", "key", "of", "name", "reason"} or not all(
            isinstance(text, str) and text.isprintable() and len(text) <= _MAX_REASON
            for text in texts
        ):
            raise Malformed("a revocation has of, name and reason, and no others")
        record: dict[str, Any] = {"kind": "revocation", "of": texts[0], "subject": texts[1]}
        record |= {"reason": texts[2], **_of(peer)}
        return Approved(number_of(tree), "", record, b"", "revocation")

    def _signature(self, item: Approved) -> bytes:
        if item.kind == "revocation":
            return b""
        if item.kind == "statement":
            return self._cosign[item.key].sign_statement(item.message)
        if item.kind == "digest":
            return self._cosign[item.key].sign_digest(item.message)
        return self._keys[item.key].sign_message(item.message).data

    def _consider_cosign(
        self, tree: dict[str, Any], kind: str, name: object, peer: Peer
    ) -> Approved:
        if not isinstance(name, str) or name not in self._cosign:
            raise Refused("signer-refused", f"there is no cosign key {str(name)[:60]!r}")
        if set(tree) != {"id", "kind", "key", kind}:
            raise Malformed(f"a request of this kind has the field {kind}, and no others")
        text = tree[kind]
        if not isinstance(text, str):
            raise Malformed(f"{kind} is a text")
        if kind == "digest":
            if not self._config.blobs:
                raise Refused(
                    "signer-refused", "digests of files are not signed here (blobs = false)"
                )
            if not _DIGEST.fullmatch(text):
                raise Malformed("digest is not 64 hex digits")
            message, digest, subject = bytes.fromhex(text), text, "a file"
        else:
            if not self._config.statements:
                raise Refused(
                    "signer-refused", "statements are not signed here (statements = false)"
                )
            message, subject, heads = _own_statement(text, self._config.store_dir)
            if not all(self.audit.had(head) for head in heads):
                raise Malformed("the statement anchors a head that this audit log never had")
            digest = hashlib.sha256(message).hexdigest()
        record: dict[str, Any] = {"kind": kind, "subject": subject, "digest": f"sha256:{digest}"}
        record |= {"key": name, "evidence": "form", **_of(peer)}
        return Approved(number_of(tree), name, record, message, kind)

    def _evidence_of_path(self, request: PathRequest, message: bytes) -> tuple[str, bool]:
        """What speaks for it, and whether its file must be hashed for that."""
        info = request.info
        if info.nar_size > _MAX_NAR:
            raise Refused("too-large", f"a NAR of {info.nar_size} bytes")
        if signer := self._trusted.signer(message, info.signatures):
            return f"signature {signer}", False
        check_content_address(info)
        named = matches(info.store_path.name, self._config.content)
        if named:
            return "content", True
        if info.ca is not None and info.ca.is_evidence:
            return "content-address", True
        raise Refused(
            "unsigned",
            f"{info.store_path}: no signature by a trusted key, no content address that can be"
            " held to its content, and its name is not among those that are signed on it",
        )

    def hash(self, waiting: ToHash) -> Approved:
        """Hold the file in storage to the narinfo, here, where the proxy cannot touch it.

        Refused or Malformed if it is not what the narinfo says, OSError if it cannot be read: then
        nothing is signed. Blocks.
        """
        info, file = waiting.info, waiting.file
        storage = self._config.storage
        if storage is None or file is None or not is_file_name(file, info.compression):
            raise Refused("unsigned", f"{info.store_path}: there is no file to hash as evidence")
        with open_regular(Path(storage.removeprefix("file://")) / "nar" / file) as opened:
            measured = inspect_file(info, opened, scan=True)
        if waiting.approved.record["evidence"] == "content-address":
            check_addressed(info, measured)
        if measured.missing and info.ca is None:  # a CA names its references itself
            lacks = ", ".join(sorted(measured.missing)[:4])
            raise Refused(
                "wrong-references", f"{info.store_path}: its NAR does not contain {lacks}"
            )
        return waiting.approved

    def _evidence_of_realisation(self, request: RealisationRequest, message: bytes) -> str:
        entry = request.entry
        if signer := self._trusted.signer(message, entry.signatures):
            return f"signature {signer}"
        names = [entry.out_path.name]
        if isinstance(entry, BuildTraceEntry):
            names.append(entry.drv_path.name.removesuffix(".drv"))
        elif "*" not in self._config.content:
            names.append(entry.id)  # a derivation that is named by a hash alone
        for name in names:
            if not matches(name, self._config.content):
                raise Refused(
                    "unsigned",
                    f"{request.name}: no signature by a trusted key, and {name} is not among the"
                    " names that are signed on their content",
                )
        return "name"


class _MessageKey(Protocol):
    """A substituter key that signs at once."""

    public: PublicKey

    def sign_message(self, message: bytes) -> Signature:
        """Ed25519 over what was approved; Unavailable if it cannot."""

    def close(self) -> None:
        """Let go of the key."""


def _open(url: str) -> _MessageKey:
    if url.startswith("pkcs11:"):
        from narseal.custody.pkcs11 import Pkcs11Key

        return Pkcs11Key(url)
    return FileKey.load(url)


def _own_statement(text: str, store_dir: str) -> tuple[bytes, str, list[AuditHead]]:
    """The bytes, what it is of, and which heads a statement of narseal's anchors."""
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise Malformed(f"a statement of more than {MAX_BYTES} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed("statement is not base-64") from error
    count, heads = check_own(data, store_dir=store_dir)
    return data, f"{count} paths", heads


def _of(peer: Peer) -> dict[str, int]:
    return {"uid": peer.uid, "pid": peer.pid}
