"""Does the index say what is in storage? For `narseal index check`; reads, changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from narseal.errors import Malformed, StorageGone
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.nars.publisher import served
from narseal.storage import Admitted, Index, LocalStorage, NarRecord, bundle_name

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
        if sentence := _check_nar(storage.path(f"nar/{nar.file}"), nar, content=content):
            yield sentence
    if total != (said := await index.stored_bytes()):
        yield f"the index counts {said} bytes of NARs, its rows {total}"
    async for admitted in _paths(index):
        for sentence in _check_path(storage, admitted, keys):
            yield sentence
    for digest in await index.attestations.digests():
        data = storage.read(bundle_name(digest))
        if data is None or hashlib.sha256(data).digest() != digest:
            yield f"{bundle_name(digest)} is missing, or not what it is named"


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


def _check_nar(file: Path, nar: NarRecord, *, content: bool) -> str | None:
    if not file.is_file():
        return f"nar/{nar.file} is in the index and not in storage"
    if file.stat().st_size != nar.file_size:
        return f"nar/{nar.file} has {file.stat().st_size} bytes, not {nar.file_size}"
    if content and nar.file_hash:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
        if digest != nar.file_hash.digest:
            return f"nar/{nar.file} has other content than was verified"
    return None


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
