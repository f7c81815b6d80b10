"""Blobs and the index."""

from narseal.storage.engine import epoch_file, index_file, migrate
from narseal.storage.epoch import Epoch
from narseal.storage.index import Index
from narseal.storage.leadership import Leadership
from narseal.storage.local import LocalStorage, storage_errors
from narseal.storage.records import Admitted, NarRecord, PathRecord, file_name

__all__ = [
    "Admitted",
    "Epoch",
    "Index",
    "Leadership",
    "LocalStorage",
    "NarRecord",
    "PathRecord",
    "epoch_file",
    "file_name",
    "index_file",
    "migrate",
    "storage_errors",
]
