"""Release files: any file, and container layouts, whose index stands for all of their blobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from narseal.errors import ConfigError, ContentMismatch

_CHUNK = 1 << 20
_MAX_DOCUMENT = 8 << 20
_MAX_DEPTH = 8
_MAX_DESCRIPTORS = 10_000

#: Told of bytes that were read.
Progress = Callable[[int], None]


def signable(path: Path) -> Path:
    """The file that a signature of `path` is over: itself, or the index of an OCI image layout."""
    if path.is_dir():
        if not (path / "oci-layout").is_file():
            raise ConfigError(f"{path}: a folder, and no OCI image layout; name the files in it")
        return path / "index.json"
    return path


def digest(path: Path, progress: Progress = lambda _: None) -> bytes:
    """The SHA-256 of a file, read once in constant memory; ConfigError if it cannot be read."""
    hasher = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(_CHUNK)
            view = memoryview(buffer)
            while count := file.readinto(buffer):
                hasher.update(view[:count])
                progress(count)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return hasher.digest()


def check_layout(folder: Path, progress: Progress = lambda _: None) -> int:
    """Hold every blob that a layout's index reaches to its digest; returns how many there are.

    ContentMismatch if one is missing or wrong. Format: OCI image layout 1.
    """
    seen: set[str] = set()
    waiting = [(descriptor, 1) for descriptor in _descriptors(folder / "index.json")]
    while waiting:
        descriptor, depth = waiting.pop()
        name = str(descriptor.get("digest"))
        if name in seen:
            continue
        seen.add(name)
        algorithm, _, value = name.partition(":")
        if algorithm != "sha256" or len(value) != 64 or not value.isalnum():
            raise ContentMismatch("content-mismatch", f"{folder}: {name[:100]} is no sha256 digest")
        blob = folder / "blobs" / "sha256" / value
        if not blob.is_file() or digest(blob, progress).hex() != value:
            raise ContentMismatch("content-mismatch", f"{blob} is missing, or not what it is named")
        if "manifest" in str(descriptor.get("mediaType")) or "index" in str(
            descriptor.get("mediaType")
        ):
            if depth >= _MAX_DEPTH or len(seen) > _MAX_DESCRIPTORS:
                raise ContentMismatch("too-large", f"{folder}: the layout is too deep or too large")
            waiting += [(inner, depth + 1) for inner in _descriptors(blob)]
    return len(seen)


def _descriptors(file: Path) -> list[dict[str, Any]]:
    """What an index or a manifest refers to."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_DOCUMENT + 1)
        if len(data) > _MAX_DOCUMENT:
            raise ValueError("too large")
        tree = json.loads(data)
        found = [*tree.get("manifests", []), *tree.get("layers", [])]
        found += [tree["config"]] if "config" in tree else []
        if not all(isinstance(item, dict) for item in found):
            raise ValueError("a descriptor is no object")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ContentMismatch("malformed", f"{file}: not an OCI document: {error}") from error
    return found
