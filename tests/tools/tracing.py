"""What strace wrote down: the system calls of a process, in the order in which they ended."""

from __future__ import annotations

from pathlib import Path

from tests.tools.cache import Entry


class Calls:
    """Those of a trace (`-o`, with `-f` and `-y`)."""

    def __init__(self, trace: Path) -> None:
        self.lines: list[str] = []
        begun: dict[str, str] = {}
        for line in trace.read_text().splitlines():
            process, call = line.split(maxsplit=1)
            if call.endswith("<unfinished ...>"):
                begun[process] = call.removesuffix("<unfinished ...>")
            elif call.startswith("<..."):
                self.lines.append(begun.pop(process) + call.partition("resumed>")[2])
            else:
                self.lines.append(call)

    def at(self, *words: str, after: int = -1) -> int:
        """Where the first call ended that names all of the words."""
        return next(
            number
            for number, line in enumerate(self.lines)
            if number > after and all(word in line for word in words)
        )

    def recorded(self, item: Entry) -> int:
        """Where the index has a NAR: its bytes, its name and its folder are on disk before, in that order."""
        renamed = self.at("rename", f'/{item.info.url}"')
        synced = self.at("fsync(", self.lines[renamed].split('"')[1])
        folder = self.at("fsync(", "/nar>", after=renamed)
        recorded = self.at("sync(", "index.sqlite-wal", after=folder)
        assert synced < renamed < folder < recorded, item.hash
        return recorded
