"""Does the index say what is in storage? For `narseal index check`; reads, changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable

from narseal.errors import Malformed, StorageBroken, StorageGone, Unavailable
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.publisher import served
from narseal.storage import Admitted, Index, LocalStorage, NarRecord, bundle_name, storage_errors

_PAGE = 500


async def problems(
    index: Index, storage: LocalStorage, keys: dict[str, PublicKey], *, content: bool
) -> AsyncIterator[str]:
    """A sentence for each thing that is wrong. With `content`, every NAR file is hashed too.

    Of a folder that is not the index's it is one sentence: that says nothing of the files.
    """
    try:
        storage.check()
    except StorageGone as error:
        yield str(error)
        return
    total = 0
    async for nar in _nars(index):
        total += nar.file_size or 0
        for sentence in _readable(f"nar/{nar.file}", _check_nar, storage, nar, content):
            yield sentence
    if total != (said := await index.stored_bytes()):
        yield f"the index counts {said} bytes of NARs, its rows {total}"
    async for admitted in _paths(index):
        name = f"{admitted[0].info.store_path.hash_part}.narinfo"
        for sentence in _readable(name, _check_path, storage, admitted, keys):
            yield sentence
    for digest in await index.attestations.digests():
        for sentence in _readable(bundle_name(digest), _check_bundle, storage, digest):
            yield sentence


def _readable(name: str, look: Callable[..., list[str]], *of: object) -> list[str]:
    """What a look at a file finds; that it cannot be read is found, too."""
    try:
        with storage_errors():
            return look(*of)
    except (StorageBroken, Unavailable) as error:
        return [f"{name} cannot be read: {error}"]


async def _nars(index: Index) -> AsyncIterator[NarRecord]:
    after = ""
    while page := await index.nars_page(after=after, limit=_PAGE):
        for nar in page:
            yield nar
        after = page[-1].file


async def _paths(index: Index) -> AsyncIterator[Admitted]:
    after = ""
    while page := await index.page(after=after, limit=_PAGE):
        for admitted in page:
            yield admitted
        after = page[-1][0].info.store_path.hash_part


def _check_nar(storage: LocalStorage, nar: NarRecord, content: bool) -> list[str]:  # noqa: FBT001
    file = storage.path(f"nar/{nar.file}")
    if not file.is_file():
        return [f"nar/{nar.file} is in the index and not in storage"]
    if file.stat().st_size != nar.file_size:
        return [f"nar/{nar.file} has {file.stat().st_size} bytes, not {nar.file_size}"]
    if content and nar.file_hash:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
        if digest != nar.file_hash.digest:
            return [f"nar/{nar.file} has other content than was verified"]
    return []


def _check_bundle(storage: LocalStorage, digest: bytes) -> list[str]:
    name = bundle_name(digest)
    data = storage.read(name)
    if data is None or hashlib.sha256(data).digest() != digest:
        return [f"{name} is missing, or not what it is named"]
    return []


def _check_path(storage: LocalStorage, admitted: Admitted, keys: dict[str, PublicKey]) -> list[str]:
    path, nar = admitted
    info = path.info
    found = []
    message = info.fingerprint()
    for signature in info.signatures:
        key = keys.get(signature.key_name)
        if key and not key.verifies(message, signature):
            found.append(f"{info.store_path}: its signature by {key.name} is not good")
    name = f"{info.store_path.hash_part}.narinfo"
    data = storage.read(name)
    if data is None:
        if nar.stored:
            found.append(f"{name} is not in storage, though its NAR is")
        return found
    try:
        kept = NarInfo.parse(data, store_dir=info.store_dir)
    except Malformed as error:
        return [*found, f"{name}: {error}"]
    if kept.fingerprint() != message or kept.url != served(path, nar).url:
        found.append(f"{name} in storage is of other content than the index says")
    return found
