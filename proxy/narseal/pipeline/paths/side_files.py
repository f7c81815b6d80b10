"""Build logs, listings and debug-info pointers: unsigned files that are passed on within bounds.

They carry no signature of ours. What an uploader brought stays in storage; what an upstream says is
kept within `limits.side_files`, so that it is served on when the upstreams are away. None of it is
in memory as a whole: it comes into a file, and leaves from there.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from narseal.errors import (
    Malformed,
    NotFound,
    Refused,
    Unavailable,
)
from narseal.nix.base32 import CHARS
from narseal.nix.bounded_json import check_shape, load_json
from narseal.pipeline.services import Services
from narseal.runtime.files import OpenFile
from narseal.runtime.single_flight import SingleFlight
from narseal.storage import UnverifiedFiles, storage_errors
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order

_LISTING = re.compile(f"{CHARS}{{32}}\\.ls", re.ASCII)
_LOG = re.compile(rf"log/{CHARS}{{32}}-[0-9a-zA-Z+\-._?=]{{1,211}}", re.ASCII)
_DEBUGINFO = re.compile(r"debuginfo/[0-9a-f]{40}(\.debug)?", re.ASCII)


_MAX_LISTING = 16 << 20  # bytes; a large one, of 100,000 files, has 8 MiB
_MAX_LISTING_VALUES = 1_500_000
_MAX_LISTING_DEPTH = 160  # a NAR nests 64 deep, and each level is two objects
_MAX_POINTER = 64 << 10


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file and its media type."""

    file: OpenFile
    content_type: str


class SideFiles:
    """`<hash>.ls`, `log/<drv>`, `debuginfo/<build id>`."""

    def __init__(self, services: Services) -> None:
        limits = services.config.limits
        self._limit = limits.side_file
        self._upstreams = services.upstreams
        self._folder = services.folder
        self._unverified = UnverifiedFiles(
            services.folder.local, most=limits.side_files, workers=services.config.workers
        )
        self._index = services.index
        self._threads = services.threads
        self._policy = services.policy
        self._flights: SingleFlight[str, OpenFile] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )

    def follows_path(self, name: str) -> bool:
        """Whether policy decides about a file as about its path."""
        return self._policy.active and name.endswith(".ls")

    async def nar_of(self, side_file: SideFile, name: str) -> str | None:
        """The NAR file that a side file points to, if policy decides about it as about that."""
        if not self._policy.active or not name.startswith("debuginfo/"):
            return None
        archive, _ = await self._threads.run(pointer, side_file.file, name)
        return archive.rpartition("/")[2]

    def limit(self, name: str) -> int:
        """How many bytes a file of this name may have."""
        if name.startswith("debuginfo/"):
            return min(self._limit, _MAX_POINTER)
        return min(self._limit, _MAX_LISTING) if name.endswith(".ls") else self._limit

    async def get(self, name: str) -> SideFile:
        """The file at `name`; NotFound, Refused, Malformed (404) or Trouble."""
        is_log = _LOG.fullmatch(name) is not None
        if not is_log and not _LISTING.fullmatch(name) and not _DEBUGINFO.fullmatch(name):
            raise NotFound(f"no such thing in a binary cache: {name[:200]!r}")
        file = await self._threads.run(self._kept, name)
        if file is None:
            file = await self._flights.join(name, lambda: self._fetch(name))
        return SideFile(file, "text/plain; charset=utf-8" if is_log else "application/json")

    def _kept(self, name: str) -> OpenFile | None:
        """In a thread: what an uploader brought, or an upstream said before."""
        return self._folder.local.file(name) or self._unverified.open(name)

    async def _fetch(self, name: str) -> OpenFile:
        answers = Answers()
        async with in_order(
            self._upstreams, lambda u: self._ask(u, name), answers, thing=name
        ) as found:
            async for _, file in found:
                try:
                    await self._threads.run(self._unverified.keep, file, name)
                except Unavailable as error:
                    answers.note(error, upstream="storage", thing=name)
                return file
        raise answers.verdict(name)

    async def _ask(self, upstream: Upstream, name: str) -> OpenFile:
        file = OpenFile.incoming(await self._folder.incoming())

        def write(data: bytes) -> None:
            with storage_errors():
                file.write(data)

        if await upstream.save(name, write, limit=self.limit(name)) is None:
            raise NotFound(f"{upstream.config.url} has no {name}")
        if name.startswith("debuginfo/"):
            return await self._debuginfo(file, upstream, name)
        if not name.startswith("log/"):
            await self._threads.run(check_listing, file, name)
        return file

    async def _debuginfo(self, file: OpenFile, upstream: Upstream, name: str) -> OpenFile:
        """Point at our own name of the archive; only an admitted narinfo gives it one."""
        archive, member = await self._threads.run(pointer, file, name)
        url = archive.removeprefix("../")
        nar = await self._index.nar_of_source(upstream.config.url, url)
        if nar is None:
            raise Refused("unsigned", f"{name}: no narinfo with {url[:200]} was asked for yet")
        ours = OpenFile.incoming(await self._folder.incoming())
        text = json.dumps({"archive": f"../nar/{nar.file}", "member": member}).encode()
        await self._threads.run(ours.write, text)
        return ours


def check_listing(file: OpenFile, name: str) -> None:
    """Malformed unless it is a listing as Nix writes it. Blocks."""
    with open(os.dup(file.descriptor), "rb") as opened:
        opened.seek(0)
        tree = check_shape(opened, what=name, depth=_MAX_LISTING_DEPTH, values=_MAX_LISTING_VALUES)
    if tree.get("version") != 1 or not isinstance(tree.get("root"), dict):
        raise Malformed(f"{name}: not a listing of version 1")


def pointer(file: OpenFile, name: str) -> tuple[str, str]:
    """Archive and member of a debug-info pointer; Malformed if it is none. Blocks."""
    if file.size > _MAX_POINTER:
        raise Malformed(f"{name}: more than {_MAX_POINTER} bytes")
    tree = load_json(file.read(), what=name)
    archive, member = (
        (tree.get("archive"), tree.get("member")) if isinstance(tree, dict) else (None, None)
    )
    if (
        not isinstance(archive, str)
        or not isinstance(member, str)
        or tree.keys() != {"archive", "member"}
    ):
        raise Malformed(f"{name}: not {{archive, member}}")
    return archive, member
