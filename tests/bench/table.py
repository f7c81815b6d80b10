"""One row of the benchmark's table."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was measured, ours and theirs, the ratio and its aim."""

    what: str
    ours: str
    theirs: str
    ratio: float | None
    aim: str


def render(rows: list[Row]) -> str:
    """The table, with the machine that it is of."""
    lines = [
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "",
        "| what | narseal | beside it | ratio | aim |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.what} | {row.ours} | {row.theirs} | {ratio} | {row.aim} |")
    return "\n".join(lines)
