"""Building signed binary caches by hand, right ones and wrong ones."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import brotli

from narseal.nix import nar
from narseal.nix.base32 import encode
from narseal.nix.compression import COMPRESSIONS
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keys import SecretKey
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import References, StorePath

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
    "zstd": zstd.compress,
    "br": brotli.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


def key(name: str) -> SecretKey:
    """A key pair that follows from its name."""
    return SecretKey.from_seed(name, hashlib.sha256(name.encode()).digest())


def store_path(name: str) -> StorePath:
    """A store path whose hash part follows from its name."""
    return StorePath(encode(hashlib.sha256(name.encode()).digest()[:20]), name)


def tree(contents: bytes) -> nar.Node:
    """A directory with a file, an executable and a link."""
    return nar.Directory(
        {
            b"bin": nar.Directory({b"run": nar.Regular(b"#!/bin/sh\n", executable=True)}),
            b"data": nar.Regular(contents),
            b"link": nar.Symlink(b"data"),
        }
    )


def with_debug_info(*build_ids: str) -> nar.Node:
    """What separate debug info looks like: a file for each build id, and a link to one of none."""
    folders: dict[bytes, dict[bytes, nar.Node]] = {}
    for build_id in build_ids:
        name = f"{build_id[2:]}.debug".encode()
        folders.setdefault(build_id[:2].encode(), {})[name] = nar.Regular(build_id.encode())
    folders.setdefault(b"00", {})[b"0" * 38 + b".debug"] = nar.Symlink(b"elsewhere")
    tree: nar.Node = nar.Directory({name: nar.Directory(files) for name, files in folders.items()})
    for name in (b".build-id", b"debug", b"lib"):
        tree = nar.Directory({name: tree})
    return tree


def pointer(item: Entry, build_id: str) -> bytes:
    """A debug-info pointer as Nix's `index-debug-info` writes it."""
    member = f"lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug"
    return json.dumps({"archive": f"../{item.info.url}", "member": member}).encode()


def harder(data: bytes) -> bytes:
    """The same bytes by zstd at another level than `entry` takes."""
    return zstd.compress(data, level=19)


def unzstd(data: bytes) -> bytes:
    """What zstd made of other bytes, whole."""
    return zstd.decompress(data)


@dataclass(frozen=True)
class Entry:
    """A path of a cache: its narinfo as a value, its files as bytes."""

    info: NarInfo
    nar: bytes
    file: bytes

    @property
    def hash(self) -> str:
        return self.info.store_path.hash_part

    def signed(self, *keys: SecretKey) -> Entry:
        """With signatures by these keys instead."""
        message = self.info.fingerprint()
        return replace(self, info=self.info.with_signatures(tuple(k.sign(message) for k in keys)))

    def but(self, **fields: object) -> Entry:
        """With other fields, signatures left as they are."""
        if "references" in fields:
            fields["references"] = References(fields["references"])  # type: ignore[arg-type]
        return replace(self, info=replace(self.info, **fields))  # type: ignore[arg-type]

    def files(self) -> dict[str, bytes]:
        """What a cache serves of it, by address."""
        return {f"{self.hash}.narinfo": self.info.render(), self.info.url: self.file}


def entry(
    name: str,
    contents: bytes | None = None,
    *,
    compression: str = "xz",
    references: tuple[StorePath, ...] = (),
    node: nar.Node | None = None,
    ca: ContentAddress | None = None,
    path: StorePath | None = None,
) -> Entry:
    """An unsigned path; the NAR holds `contents`, or is of `node`."""
    plain = b"".join(nar.render(node or tree(contents if contents is not None else name.encode())))
    file = COMPRESS[compression](plain)
    file_hash = Hash.sha256(file)
    info = NarInfo(
        store_dir="/nix/store",
        store_path=path or store_path(name),
        url=f"nar/{file_hash.nix32}.nar{COMPRESSIONS[compression]}",
        compression=compression,
        nar_hash=Hash.sha256(plain),
        nar_size=len(plain),
        file_hash=file_hash,
        file_size=len(file),
        references=References(references),
        ca=ca,
    )
    return Entry(info, plain, file)


def addressed(name: str, contents: bytes) -> Entry:
    """A path that its own NAR addresses (`fixed:r:sha256`), unsigned."""
    node = nar.Regular(contents)
    plain = b"".join(nar.render(node))
    ca = ContentAddress(Method.NAR, Hash.sha256(plain))
    path = ca.store_path(name, (), self_hash="", store_dir="/nix/store")
    assert path
    return entry(name, node=node, ca=ca, path=path, compression="zstd")


def write_cache(folder: Path, *entries: Entry) -> None:
    """A `file://` cache of these paths."""
    (folder / "nar").mkdir(parents=True, exist_ok=True)
    (folder / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    for item in entries:
        for name, data in item.files().items():
            (folder / name).write_bytes(data)
