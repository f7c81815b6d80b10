"""Entries of a transparency log: that the log has them, and what they are of.

Format: `sigstore_rekor.proto` of sigstore/protobuf-specs; checkpoints are C2SP tlog-checkpoints.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode
from typing import Any

from sigstore._internal.trust import KeyringPurpose
from sigstore.models import TransparencyLogEntry, TrustedRoot
from sigstore_models.rekor.v1 import TransparencyLogEntry as Model

from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import read_base64
from narseal.errors import MalformedAttestation, Refused

#: Entries of Rekor v2, which promises nothing and tells no time: its checkpoint says it all.
_V2 = ("hashedrekord", "0.0.2")
#: A line of a checkpoint's signatures (C2SP signed-note), and how many there may be.
_SIGNATURE = re.compile(r"\u2014 ([^\s+]+) ([0-9A-Za-z+/]+={0,2})")
_MOST_SIGNATURES = 100


def body_of(entry: Model) -> Any:
    """What the log has; MalformedAttestation if it is not JSON."""
    try:
        return json.loads(entry.canonicalized_body)
    except (ValueError, RecursionError) as error:
        raise _unreadable(error) from error


def verify(entry: Model, body: Any, root: TrustedRoot) -> int:
    """The index of an entry, with its `body`, that a trusted log has, by its proof and the log's checkpoint.

    Whatever else the entry says of its place, its log and its time is held to that too. Refused
    or an error of sigstore-python if it does not verify.
    """
    TransparencyLogEntry(entry)._verify(root.rekor_keyring(KeyringPurpose.VERIFY))  # noqa: SLF001
    if entry.log_id.key_id not in {log.log_id.key_id for log in root._inner.tlogs}:  # noqa: SLF001
        raise refused("its logId is of no log of the trusted root")
    checkpoint = entry.inclusion_proof.checkpoint
    assert checkpoint is not None  # it was verified
    _check_origin(checkpoint.envelope, entry.log_id.key_id)
    kind = (entry.kind_version.kind, entry.kind_version.version)
    if kind != (body["kind"], body["apiVersion"]):
        raise refused("its kindVersion is not that of the log's entry")
    promise = entry.inclusion_promise
    promised = bool(promise and promise.signed_entry_timestamp)
    if promised and not entry.integrated_time:
        raise refused("its inclusionPromise has no integratedTime, which it would be over")
    if kind == _V2:
        if entry.integrated_time or promised:
            raise refused("its log gives no integratedTime and no inclusionPromise")
        if entry.log_index != entry.inclusion_proof.log_index:
            raise refused("its logIndex is not that of its inclusionProof")
    # Rekor v1 counts over all its trees; the promise, which was verified, is over that number
    return int(entry.log_index if promised else entry.inclusion_proof.log_index)


def _check_origin(envelope: str, log_id: bytes) -> None:
    """The signature that was verified, the first of the log's, is under the log's own name."""
    note, _, block = envelope.partition("\n\n")
    lines = [_SIGNATURE.fullmatch(line) for line in block.removesuffix("\n").split("\n")]
    found = [(line[1], read_base64(line[2], "checkpoint")) for line in lines if line]
    if not len(found) == len(lines) <= _MOST_SIGNATURES:
        raise refused("its checkpoint has other lines than signatures, or too many")
    name = next(name for name, data in found if data[:4] == log_id[:4])
    if name != note.strip().partition("\n")[0].partition(" ")[0]:
        raise refused("its checkpoint is signed under another name than its origin")


def check_body(body: Any, *, digest: bytes, signature: bytes, key: CosignPublicKey) -> None:
    """The log entry is of this digest, signature and key, and of nothing else."""
    try:
        version = (body["kind"], body["apiVersion"])
        if version == _V2:
            spec = body["spec"]["hashedRekordV002"]
            found = (
                b64decode(spec["data"]["digest"]),
                b64decode(spec["signature"]["content"]),
                b64decode(spec["signature"]["verifier"]["publicKey"]["rawBytes"]),
            )
        elif version == ("hashedrekord", "0.0.1"):
            spec = body["spec"]
            pem = b64decode(spec["signature"]["publicKey"]["content"]).decode()
            found = (
                bytes.fromhex(spec["data"]["hash"]["value"]),
                b64decode(spec["signature"]["content"]),
                CosignPublicKey.parse(pem).der,
            )
        else:
            raise refused(f"its log entry is of a kind that is not verified: {version}")
    except Refused:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(error) from error
    if found != (digest, signature, key.der):
        raise refused("its log entry is of another signature")


def _unreadable(error: Exception) -> MalformedAttestation:
    return MalformedAttestation(f"the bundle's log entry cannot be read: {error!r}")


def refused(message: str) -> Refused:
    """What is said of a bundle that can be read and is not good."""
    return Refused("bad-bundle", f"the bundle does not verify: {message}")
