"""An upstream in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import aiofiles

from narseal.config import UpstreamConfig
from narseal.errors import NotFound, Refused, UpstreamTrouble
from narseal.upstream.source import Body


class FileUpstream:
    """The folder of a `file://` URL."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.config = config
        self._root = Path(config.url.removeprefix("file://"))

    async def get(self, name: str, *, limit: int) -> bytes | None:
        """See Upstream.get."""
        try:
            async with aiofiles.open(self._root / name, "rb") as file:
                data: bytes = await file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            if not self._root.is_dir():
                raise UpstreamTrouble(f"{self._root} is not there; is it mounted?") from None
            return None
        except OSError as error:
            raise UpstreamTrouble(f"{self._root / name}: {error.strerror}") from error
        if len(data) > limit:
            raise Refused("too-large", f"{self._root / name} has more than {limit} bytes")
        return data

    @contextmanager
    def open(self, url: str, offset: int) -> Iterator[Body]:
        """See Upstream.open."""
        path = self._root / unquote(url.partition("?")[0])
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
