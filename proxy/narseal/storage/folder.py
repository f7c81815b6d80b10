"""The storage folder as the loop sees it: each call of `LocalStorage` in a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from narseal.errors import Unavailable
from narseal.runtime.batching import Batcher
from narseal.runtime.files import OpenFile
from narseal.runtime.threads import ThreadPools
from narseal.storage.local import LocalStorage

#: A file on its way in: an open descriptor, and where it lies until it is published.
Incoming = tuple[int, Path]

#: Files that are published together, and how many bytes such a one may have: the disk takes its time for more.
_GROUP = 64
_LARGE = 1 << 20


class _Complete(NamedTuple):
    file: OpenFile
    name: str
    then: Callable[[], None] | None


class Folder:
    """See LocalStorage for what each method does, and raises."""

    def __init__(self, local: LocalStorage, threads: ThreadPools) -> None:
        #: For work that is in a thread already.
        self.local = local
        self._threads = threads
        self._complete: Batcher[_Complete, None] = Batcher(self._publish, most=_GROUP)

    async def run(self) -> None:
        """Publish in groups until closed."""
        await self._complete.run()

    async def close(self) -> None:
        """Let `run` end once all is published that was given before."""
        await self._complete.close()

    def path(self, name: str) -> Path:
        """Where a published file lies."""
        return self.local.path(name)

    async def check(self) -> None:
        """StorageGone unless it is there, and the index's."""
        await self._threads.run(self.local.check)

    async def file(self, name: str) -> OpenFile | None:
        """A published file for as long as anybody has it; None if there is none."""
        return await self._threads.run(self.local.file, name)

    async def read(self, name: str) -> bytes | None:
        """A small file's bytes, None if there is none."""
        return await self._threads.run(self.local.read, name)

    async def write(self, name: str, data: bytes) -> None:
        """Publish a small file."""
        await self._threads.run(self.local.write, name, data)

    async def write_all(self, files: Mapping[str, bytes], *, together: bool = False) -> None:
        """Publish several small files."""
        await self._threads.run(partial(self.local.write_all, files, together=together))

    async def remove(self, name: str) -> None:
        """Take a file away; nothing if there is none."""
        await self._threads.run(self.local.remove, name)

    async def remove_all(self, names: Sequence[str]) -> None:
        """Take several files away, as far as they are there."""

        def remove() -> None:
            for name in names:
                self.local.remove(name)

        await self._threads.run(remove)

    async def other_than(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those of several small files that are not there as they are given."""

        def differing() -> dict[str, bytes]:
            return {name: data for name, data in files.items() if self.local.read(name) != data}

        return await self._threads.run(differing)

    async def incoming(self) -> Incoming:
        """A new file to write and read."""
        return await self._threads.run(self.local.incoming)

    async def open_incoming(self, name: str) -> OpenFile | None:
        """A file that another worker brings; None if it is not there any more."""
        return await self._threads.run(self.local.open_incoming, name)

    async def is_published(self, descriptor: int, name: str) -> bool:
        """Whether an open file is the published one of a name."""
        return await self._threads.run(self.local.is_published, descriptor, name)

    async def arriving(self) -> Incoming:
        """A new file for an uploaded NAR."""
        return await self._threads.run(self.local.arriving)

    async def publish(self, incoming: Incoming, name: str) -> None:
        """Give a complete file its name, durably."""
        await self._threads.run(self.local.publish, *incoming, name)

    async def publish_in_group(
        self, file: OpenFile, name: str, *, then: Callable[[], None] | None = None
    ) -> None:
        """The same, together with what else is complete by then, unless it is large.

        The file may be let go of at any time. What is to be done `then`, whatever became of it, is done in the same
        thread; it raises nothing.
        """
        complete = _Complete(file, name, then)
        if file.size <= _LARGE:
            await self._complete.ask(complete)
            return
        [failure] = await self._publish([complete])
        if failure:
            raise failure

    async def _publish(self, group: list[_Complete]) -> list[Any]:
        return await self._threads.run(self._publish_each, group)

    def _publish_each(self, group: list[_Complete]) -> list[Unavailable | None]:
        outcomes = self.local.publish_each([(each.file, each.name) for each in group])
        for each in group:
            if each.then:
                each.then()
        return outcomes

    async def link(self, name: str, other: str) -> None:
        """Give a published file another name, too."""
        await self._threads.run(self.local.link, name, other)

    async def discard(self, incoming: Incoming) -> None:
        """Close a file that was on its way in, and drop it unless it was published."""
        await self._threads.run(self.local.discard, incoming)

    async def quarantine(self, file: Path, label: str) -> None:
        """Keep a wrong file for the operator to look at."""
        await self._threads.run(self.local.quarantine, file, label)
