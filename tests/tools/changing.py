"""Changing the configuration of a narseal that serves, and waiting until that is in force."""

from __future__ import annotations

from typing import Any

import aiohttp

from tests.tools.cache import Entry
from tests.tools.narseal import Process, render_toml, settings
from tests.tools.waiting import eventually, until


def write(process: Process, *upstreams: dict[str, Any], **more: Any) -> None:
    """A new configuration in the place of the old one."""
    new = process.folder / "narseal.toml.new"
    new.write_text(render_toml(settings(process.folder, *upstreams, **more)))
    new.replace(process.folder / "narseal.toml")


def logged(process: Process, sentence: str, times: int = 1) -> str:
    """A line of the log that must come so often."""

    def lines() -> list[str]:
        return [s for s in process.log.read_text().splitlines() if sentence in s]

    until(lambda: len(lines()) >= times, f"{sentence} is not in {process.log}")
    return lines()[-1]


async def everywhere(process: Process, item: Entry, status: int) -> None:
    """Wait until every worker answers so: 40 fresh connections in a row."""

    async def forty_in_a_row() -> bool:
        for _ in range(40):
            async with (
                aiohttp.ClientSession() as fresh,
                fresh.get(f"{process.url}/{item.hash}.narinfo") as response,
            ):
                if response.status != status:
                    return False
        return True

    await eventually(forty_in_a_row)
