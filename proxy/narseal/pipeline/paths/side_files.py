"""Build logs, listings and debug-info pointers: unsigned files that are passed on within bounds.

They carry no signature of ours. They are kept in storage, so that they are served on when the
upstreams are away.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from narseal.errors import (
    Malformed,
    NotFound,
    Refused,
    Unavailable,
)
from narseal.nix.base32 import CHARS
from narseal.pipeline.services import Services
from narseal.runtime.single_flight import SingleFlight
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order

_LISTING = re.compile(f"{CHARS}{{32}}\\.ls", re.ASCII)
_LOG = re.compile(rf"log/{CHARS}{{32}}-[0-9a-zA-Z+\-._?=]{{1,211}}", re.ASCII)
_DEBUGINFO = re.compile(r"debuginfo/[0-9a-f]{40}(\.debug)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file and its media type."""

    data: bytes
    content_type: str


class SideFiles:
    """`<hash>.ls`, `log/<drv>`, `debuginfo/<build id>`."""

    def __init__(self, services: Services) -> None:
        self._limit = services.config.limits.side_file
        self._upstreams = services.upstreams
        self._folder = services.folder
        self._index = services.index
        self._threads = services.threads
        self._policy = services.policy
        self._flights: SingleFlight[str, bytes] = SingleFlight(
            services.tasks, on_joined=metrics.flights_joined.inc
        )

    def follows_path(self, name: str) -> bool:
        """Whether policy decides about a file as about its path."""
        return self._policy.active and name.endswith(".ls")

    async def get(self, name: str) -> SideFile:
        """The file at `name`; NotFound, Refused, Malformed (404) or Trouble."""
        is_log = _LOG.fullmatch(name) is not None
        if not is_log and not _LISTING.fullmatch(name) and not _DEBUGINFO.fullmatch(name):
            raise NotFound(f"no such thing in a binary cache: {name[:200]!r}")
        data = await self._folder.read(name)
        if data is None:
            data = await self._flights.join(name, lambda: self._fetch(name))
        return SideFile(data, "text/plain; charset=utf-8" if is_log else "application/json")

    async def _fetch(self, name: str) -> bytes:
        answers = Answers()
        async with in_order(
            self._upstreams, lambda u: self._ask(u, name), answers, thing=name
        ) as found:
            async for _, data in found:
                try:
                    await self._folder.write(name, data)
                except Unavailable as error:
                    answers.note(error, upstream="storage", thing=name)
                return data
        raise answers.verdict(name)

    async def _ask(self, upstream: Upstream, name: str) -> bytes:
        data = await upstream.get(name, limit=self._limit)
        if data is None:
            raise NotFound(f"{upstream.config.url} has no {name}")
        if name.startswith("log/"):
            return data
        tree = await self._threads.run(json_object, data, name)
        if name.startswith("debuginfo/"):
            return await self._debuginfo(tree, upstream, name)
        check_listing(tree, name)
        return data

    async def _debuginfo(self, tree: dict[str, object], upstream: Upstream, name: str) -> bytes:
        """Point at our own name of the archive; only an admitted narinfo gives it one."""
        archive, member = pointer(tree, name)
        url = archive.removeprefix("../")
        nar = await self._index.nar_of_source(upstream.config.url, url)
        if nar is None:
            raise Refused("unsigned", f"{name}: no narinfo with {url[:200]} was asked for yet")
        return json.dumps({"archive": f"../nar/{nar.file}", "member": member}).encode()


def check_listing(tree: dict[str, object], name: str) -> None:
    """Malformed unless it is a listing as Nix writes it."""
    if tree.get("version") != 1 or not isinstance(tree.get("root"), dict):
        raise Malformed(f"{name}: not a listing of version 1")


def pointer(tree: dict[str, object], name: str) -> tuple[str, str]:
    """Archive and member of a debug-info pointer; Malformed if it is none."""
    archive, member = tree.get("archive"), tree.get("member")
    if (
        tree.keys() != {"archive", "member"}
        or not isinstance(archive, str)
        or not isinstance(member, str)
    ):
        raise Malformed(f"{name}: not {{archive, member}}")
    return archive, member


def json_object(data: bytes, name: str) -> dict[str, object]:
    """The object that a JSON file is; Malformed if it is none. Blocks."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{name}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise Malformed(f"{name}: not a JSON object")
    return tree
