"""The NAR reader on trees of tiny files: MB a second of processor time, the SHA-256 included."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from narseal.nix import nar
from narseal.nix.nar_reader import NarReader
from tests.bench.table import Row
from tests.tools.nar_reader import ReferenceNarReader

_FILES = 20_000
_PORTION = 1 << 18  # as decoders hand them out


def measure() -> list[Row]:
    """Beside the reader that the tests hold it to, which reads token by token."""
    return [
        _row(name, b"".join(nar.render(tree(random.Random(1))))) for name, tree in TREES.items()
    ]


def _flat(low: int, high: int, *, executable: bool = False) -> Callable[[random.Random], nar.Node]:
    def tree(choice: random.Random) -> nar.Node:
        contents = (choice.randbytes(choice.randint(low, high)) for _ in range(_FILES))
        return nar.Directory(
            {b"file-%06d.txt" % n: nar.Regular(c, executable) for n, c in enumerate(contents)}
        )

    return tree


def _links(choice: random.Random) -> nar.Node:
    return nar.Directory(
        {b"%06d" % n: nar.Symlink(b"/nix/store/%032d-x/bin/y" % n) for n in range(_FILES)}
    )


def _folders(of: int) -> Callable[[random.Random], nar.Node]:
    def tree(choice: random.Random) -> nar.Node:
        return nar.Directory(
            {
                b"folder-%06d" % n: nar.Directory(
                    {
                        b"module%03d.py" % m: nar.Regular(
                            choice.randbytes(choice.randint(100, 1000))
                        )
                        for m in range(of)
                    }
                )
                for n in range(_FILES // of)
            }
        )

    return tree


TREES = {
    "20,000 empty files": _flat(0, 0),
    "20,000 files of 100 bytes": _flat(100, 100),
    "20,000 executables of 100 bytes": _flat(100, 100, executable=True),
    "20,000 files of 100 to 1,000 bytes": _flat(100, 1000),
    "20,000 files of 1 KiB": _flat(1024, 1024),
    "20,000 symlinks": _links,
    "20,000 files of 100 to 1,000 bytes, 4 in a folder": _folders(4),
    "20,000 files of 100 to 1,000 bytes, each in its folder": _folders(1),
}


def _row(what: str, data: bytes) -> Row:
    ours = min(_seconds(NarReader, data) for _ in range(7))
    plain = _seconds(ReferenceNarReader, data)
    mine, other = (f"{len(data) / seconds / 1e6:,.0f} MB/s" for seconds in (ours, plain))
    return Row(
        f"reading a NAR of {what}, against token by token (CPU)",
        mine,
        other,
        plain / ours,
        "≥ 200 MB/s",
    )


def _seconds(make: type[NarReader | ReferenceNarReader], data: bytes) -> float:
    reader = make(max_size=len(data))
    begun = time.process_time()
    for at in range(0, len(data), _PORTION):
        reader.feed(data[at : at + _PORTION])
    reader.finish()
    return time.process_time() - begun
