"""Blobs and the index."""

from narseal.storage.attestations import Attestations, SignedBatch, bundle_name
from narseal.storage.engine import backup, check_founded, migrate, migrate_present
from narseal.storage.epoch import Epoch
from narseal.storage.folder import Folder
from narseal.storage.index import Index
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
    "check_founded",
    "conflict",
    "epoch_file",
    "file_name",
    "index_file",
    "migrate",
    "migrate_present",
    "still_says",
    "storage_errors",
]
