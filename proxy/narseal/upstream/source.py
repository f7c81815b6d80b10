"""What a source of paths can do, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from narseal.config import UpstreamConfig
from narseal.runtime.budget import Claim


@dataclass(frozen=True, slots=True)
class Body:
    """A file that is being read from an offset on."""

    #: Of the whole file, in bytes; None if the upstream does not say.
    size: int | None
    #: Blocks for the next bytes, at most as many as are asked for; none at the end.
    read: Callable[[int], bytes]


class Upstream(Protocol):
    """A binary cache that narseal stands in front of."""

    @property
    def config(self) -> UpstreamConfig:
        """Its address, keys and bounds."""

    async def get(self, name: str, *, limit: int, claim: Claim | None = None) -> bytes | None:
        """A small file by its plain name, decoded; None if it is confirmed absent.

        Its bytes are taken from `claim` as they come. Raises Refused("too-large") beyond `limit`
        bytes, UpstreamTrouble or UpstreamTimeout, Unavailable if there is no room for them.
        """

    async def fetch(self, url: str, *, limit: int) -> bytes | None:
        """A small NAR by the URL of its narinfo, if all of it comes at once; None if it is confirmed absent.

        Raises as `get` does. Of an upstream that answers and then breaks off, or is slow, that says nothing more.
        """

    async def save(self, name: str, write: Callable[[bytes], object], *, limit: int) -> int | None:
        """A file that may be large, given to `write` in a thread, portion by portion.

        Its size in bytes, decoded; None if it is confirmed absent. Raises as `get` does, and what
        `write` raises.
        """

    def open(self, url: str, offset: int) -> AbstractContextManager[Body]:
        """A NAR by the URL of its narinfo, from a byte on. Blocks: for a thread.

        Raises NotFound, UpstreamTrouble or UpstreamTimeout, on entering or while it is read.
        """

    async def close(self) -> None:
        """Let go of connections."""
