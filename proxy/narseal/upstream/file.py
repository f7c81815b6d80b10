"""An upstream in a local folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import aiofiles

from narseal.config import UpstreamConfig
from narseal.errors import NotFound, Refused, UpstreamTrouble
from narseal.runtime.budget import Claim
from narseal.upstream.source import Body

_PORTION = 256 << 10


class FileUpstream:
    """The folder of a `file://` URL."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self._root = Path(config.url.removeprefix("file://"))

    async def get(self, name: str, *, limit: int, claim: Claim | None = None) -> bytes | None:
        """See Upstream.get."""
        body = bytearray()

        def write(data: bytes) -> None:
            if claim:
                claim.take(len(data))
            body.extend(data)

        found = await self.save(name, write, limit=limit)
        return None if found is None else bytes(body)

    async def fetch(self, url: str, *, limit: int) -> bytes | None:
        """See Upstream.fetch."""
        return await self.get(_name_of(url), limit=limit)

    async def save(self, name: str, write: Callable[[bytes], object], *, limit: int) -> int | None:
        """See Upstream.save."""
        path, size = self._root / name, 0
        try:
            async with aiofiles.open(path, "rb") as file:
                while data := await file.read(_PORTION):
                    size += len(data)
                    if size > limit:
                        raise Refused("too-large", f"{path} has more than {limit} bytes")
                    await asyncio.to_thread(write, data)
        except (FileNotFoundError, NotADirectoryError):
            if not self._root.is_dir():
                raise UpstreamTrouble(f"{self._root} is not there; is it mounted?") from None
            return None
        except OSError as error:
            raise UpstreamTrouble(f"{path}: {error.strerror}") from error
        return size

    @contextmanager
    def open(self, url: str, offset: int) -> Iterator[Body]:
        """See Upstream.open."""
        path = self._root / _name_of(url)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                yield Body(path.stat().st_size, file.read)
        except FileNotFoundError as error:
            raise NotFound(f"{path} is not there") from error
        except OSError as error:
            raise UpstreamTrouble(f"{path}: {error.strerror}") from error

    async def close(self) -> None:
        """Nothing is held."""


def _name_of(url: str) -> str:
    return unquote(url.partition("?")[0])
