"""The NAR of a path on disk, as `nix-store --dump` has it, read in constant memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from narseal.errors import ConfigError
from narseal.nix import nar
from narseal.nix.hashes import Hash
from narseal.nix.nar_reader import NarReader

_CHUNK = 1 << 20


def nar_hash(path: Path) -> Hash:
    """The SHA-256 of a path's NAR; ConfigError if it cannot be read or is no tree that Nix has."""
    reader = NarReader(max_size=1 << 62)
    try:
        for piece in nar.render(_node(os.fsencode(path))):
            reader.feed(piece)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return reader.finish().nar_hash


def _node(path: bytes) -> nar.Node:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return nar.Symlink(os.readlink(path))
    if stat.S_ISDIR(status.st_mode):
        return nar.Directory({name: _node(os.path.join(path, name)) for name in os.listdir(path)})
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{os.fsdecode(path)}: neither a file nor a folder nor a link")
    executable = bool(status.st_mode & stat.S_IXUSR)
    return nar.Streamed(status.st_size, lambda: _pieces(path, status.st_size), executable)


def _pieces(path: bytes, size: int) -> Iterator[bytes]:
    """`size` bytes of a file; ConfigError if it changes meanwhile."""
    with open(path, "rb", buffering=0) as file:
        left = size
        while left and (data := file.read(min(left, _CHUNK))):
            left -= len(data)
            yield data
        if left or file.read(1):
            raise ConfigError(f"{os.fsdecode(path)}: changed while it was read")
