"""Blobs and the index."""

from narseal.storage.attestations import Attestations, SignedBatch, bundle_name
from narseal.storage.engine import backup, migrate, migrate_present
from narseal.storage.epoch import Epoch
from narseal.storage.folder import Folder
from narseal.storage.index import Index
from narseal.storage.joining import join, join_for_rebuild, join_if_known, take
from narseal.storage.local import LocalStorage, storage_errors
from narseal.storage.presence import Presence, epoch_file, index_file
from narseal.storage.records import (
    Admitted,
    Attestation,
    NarRecord,
    PathRecord,
    RealisationRecord,
    conflict,
    file_name,
    still_says,
)
from narseal.storage.revocations import Revocation, Revocations, Revoked
from narseal.storage.unverified import UnverifiedFiles

__all__ = [
    "Admitted",
    "Attestation",
    "Attestations",
    "Epoch",
    "Folder",
    "Index",
    "LocalStorage",
    "NarRecord",
    "PathRecord",
    "Presence",
    "RealisationRecord",
    "Revocation",
    "Revocations",
    "Revoked",
    "SignedBatch",
    "UnverifiedFiles",
    "backup",
    "bundle_name",
    "conflict",
    "epoch_file",
    "file_name",
    "index_file",
    "join",
    "join_for_rebuild",
    "join_if_known",
    "migrate",
    "migrate_present",
    "still_says",
    "storage_errors",
    "take",
]
