"""Downloading a release file that has its name only once it was verified."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import requests

from narseal import __version__
from narseal.cosign.bundle import MAX_BYTES, Bundle
from narseal.cosign.verify import Verified, Verifier
from narseal.errors import ConfigError, NotFound, Refused, UpstreamTrouble

_CHUNK = 1 << 20
_TIMEOUT = 60.0

#: Told of the whole size, if it is known, and of each portion's.
Progress = Callable[[int | None, int], None]


def fetch(
    url: str,
    target: Path,
    *,
    bundle_url: str,
    verifier: Verifier,
    max_bytes: int,
    progress: Progress,
) -> Verified:
    """Download `url` beside `target`, verify it with the bundle, and only then give it the name.

    Refused or MalformedAttestation if it does not verify: nothing is left then. NotFound,
    UpstreamTrouble if it cannot be had. Blocks.
    """
    bundle = Bundle.parse(_small(bundle_url))
    with _temporary(target) as (part, file):
        hasher = hashlib.sha256()
        taken = 0
        with _answer(url) as response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isascii() and length.isdigit() else None
            for data in response.iter_content(_CHUNK):
                taken += len(data)
                if taken > max_bytes:
                    raise Refused("too-large", f"{url} has more than {max_bytes} bytes")
                file.write(data)
                hasher.update(data)
                progress(size, len(data))
        if size is not None and taken != size and "Content-Encoding" not in response.headers:
            raise UpstreamTrouble(f"{url}: ended after {taken} of {size} bytes")
        verified = verifier.verify(bundle, hasher.digest())
        file.flush()
        os.fsync(file.fileno())
        part.replace(target)
    return verified


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A file beside the target, for its owner alone, gone unless it was renamed."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with open(descriptor, "wb") as file:
            yield Path(name), file
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _answer(url: str) -> Iterator[requests.Response]:
    headers = {"User-Agent": f"narseal/{__version__}", "Accept-Encoding": "identity"}
    try:
        with requests.get(url, stream=True, timeout=_TIMEOUT, headers=headers) as response:
            if response.status_code in (403, 404, 410):
                raise NotFound(f"{url}: {response.status_code}")
            response.raise_for_status()
            yield response
    except (requests.RequestException, ValueError) as error:
        raise UpstreamTrouble(f"{url}: {error}") from error


def _small(url: str) -> bytes:
    with _answer(url) as response:
        data = b""
        for portion in response.iter_content(_CHUNK):
            data += portion
            if len(data) > MAX_BYTES:
                raise Refused("too-large", f"{url} has more than {MAX_BYTES} bytes")
    return data
