"""Does the index say what is in storage? For `narseal index check`; reads, changes nothing.

The index is looked through in shares, by two processes for each processor: most of the time goes into
signatures that are verified, and the rest into waiting for small files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from narseal.errors import Malformed, StorageBroken, StorageGone, Unavailable
from narseal.nix.base32 import encode
from narseal.nix.fingerprint import of_texts
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.narinfo import MAX_BYTES, NarInfo, rendered
from narseal.pipeline.nars.publisher import served
from narseal.storage import Admitted, LocalStorage, bundle_name, storage_errors
from narseal.storage.inventory import Inventory, Share

_SHARE = 10_000
_EACH = 2  # processes for a processor


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked, and how."""

    #: Of the index.
    url: str
    store_dir: str
    storage: LocalStorage
    #: The operator's, by name.
    keys: dict[str, PublicKey]
    #: Whether every NAR file is hashed too.
    content: bool


def problems(subject: Subject, *, share: int = _SHARE) -> Iterator[str]:
    """A sentence for each thing that is wrong.

    Of a folder that is not the index's it is one sentence: that says nothing of the files. Blocks;
    begins processes unless everything is in two shares.
    """
    try:
        subject.storage.check()
    except StorageGone as error:
        yield str(error)
        return
    with Inventory.opened(subject.url, subject.store_dir) as inventory:
        shares = inventory.shares(share)
        miscounts, bundles = inventory.miscounts(), inventory.bundles()
    yield from miscounts
    try:
        for found in _looked_at(subject, shares):
            yield from found
        for digest in bundles:
            name, look = bundle_name(digest), partial(_check_bundle, subject.storage, digest)
            yield from _found(subject.storage, name, look)
    except StorageGone as error:  # it went away meanwhile; what was said before is so
        yield str(error)


def _looked_at(subject: Subject, shares: Sequence[Share]) -> Iterator[list[str]]:
    """What is wrong with each share, in their order."""
    look = partial(_look_at, subject)
    if len(shares) <= 2:
        yield from map(look, shares)
        return
    # the child has what is here, and no thread runs yet
    context = multiprocessing.get_context("fork")
    processes = _EACH * len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(processes, len(shares)), context) as pool:
        yield from pool.map(look, shares)


def _look_at(subject: Subject, share: Share) -> list[str]:
    """What is wrong with a share; Unavailable if the index cannot be read, in whatever process."""
    with Inventory.opened(subject.url, subject.store_dir) as inventory:
        return _Look(subject, inventory).at(share)


class _Look:
    """Compares rows with files: as texts, which is quick; what differs is looked at as values."""

    def __init__(self, subject: Subject, inventory: Inventory) -> None:
        self._subject = subject
        self._inventory = inventory
        self._root = str(subject.storage.root)

    def at(self, share: Share) -> list[str]:
        """What is wrong with the rows of a share."""
        is_nar = share.table == "nar"
        look = self._nar if is_nar else self._path
        found = []
        for row in self._inventory.rows(share):
            key = row.file if is_nar else row.hash_part
            name = f"nar/{key}" if is_nar else f"{key}.narinfo"
            if wrong := self._found(name, look, row):
                # what narseal changed meanwhile is looked at anew
                now = self._inventory.again(share.table, key)
                if now is not None:
                    found += wrong if now == row else self._found(name, look, now)
        return found

    def _found(self, name: str, look: Callable[[Any], list[str]], row: Any) -> list[str]:
        return _found(self._subject.storage, name, partial(look, row))

    def _nar(self, row: Any) -> list[str]:
        name = f"nar/{row.file}"
        file = f"{self._root}/{name}"
        status = self._subject.storage.if_there(partial(os.stat, file), name)
        if status is None or not stat.S_ISREG(status.st_mode):
            return [f"{name} is in the index and not in storage"]
        if status.st_size != row.file_size:
            return [f"{name} has {status.st_size} bytes, not {row.file_size}"]
        if self._subject.content and row.file_hash:
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").digest()
            if digest != row.file_hash:
                return [f"{name} has other content than was verified"]
        return []

    def _path(self, row: Any) -> list[str]:
        store_dir, keys = self._inventory.store_dir, self._subject.keys
        path, nar_hash = f"{row.hash_part}-{row.name}", f"sha256:{encode(row.nar_hash)}"
        message = of_texts(store_dir, path, nar_hash, row.nar_size, row.refs)
        signatures = row.signatures.split("\n") if row.signatures else []
        found = []
        for text in signatures:
            key = keys.get(text.partition(":")[0])
            if key and not key.verifies(message, Signature.parse(text)):
                found.append(f"{path}: its signature by {key.name} is not good")
        name = f"{row.hash_part}.narinfo"
        data = self._quickly(name)
        if data is not None and data == rendered(
            path=f"{store_dir}/{path}",
            url=f"nar/{row.file}",
            compression=row.compression,
            file_hash=f"sha256:{encode(row.file_hash)}" if row.file_hash else None,
            file_size=row.file_size,
            nar_hash=nar_hash,
            nar_size=row.nar_size,
            references=row.refs,
            deriver=row.deriver,
            signatures=signatures,
            ca=row.ca,
            extra=json.loads(row.extra),
        ):
            return found
        return [*found, *self._other(name, self._inventory.admitted(row), message)]

    def _other(self, name: str, admitted: Admitted, message: bytes) -> list[str]:
        """What is wrong with a narinfo that is not there, or not to the letter as it is served."""
        path, nar = admitted
        data = self._subject.storage.read(name)
        if data is None:
            if not nar.stored or not path.ours:  # what was never signed, policy keeps back
                return []
            return [f"{name} is not in storage, though its NAR is, unless policy keeps it back"]
        try:
            kept = NarInfo.parse(data, store_dir=path.info.store_dir)
        except Malformed as error:
            return [f"{name}: {error}"]
        if kept.fingerprint() != message or kept.url != served(path, nar).url:
            return [f"{name} in storage is of other content than the index says"]
        return []

    def _quickly(self, name: str) -> bytes | None:
        """A small file's bytes; None if it is not there, as it seems."""
        try:
            opened = os.open(f"{self._root}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return os.read(opened, MAX_BYTES + 1)
        finally:
            os.close(opened)


def _found(storage: LocalStorage, name: str, look: Callable[[], list[str]]) -> list[str]:
    """What a look at a file and its row finds; that one of them cannot be read is found, too.

    StorageGone if the folder is not the index's: that says nothing of the file.
    """
    try:
        with storage_errors():
            found = look()
    except StorageGone:
        raise
    except (StorageBroken, Unavailable) as error:
        found = [f"{name} cannot be read: {error}"]
    except ValueError as error:  # Malformed is one
        found = [f"{name}: its row in the index cannot be read: {error}"]
    if found:
        storage.check()
    return found


def _check_bundle(storage: LocalStorage, digest: bytes) -> list[str]:
    name = bundle_name(digest)
    data = storage.read(name)
    if data is None or hashlib.sha256(data).digest() != digest:
        return [f"{name} is missing, or not what it is named"]
    return []
