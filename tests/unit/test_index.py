"""The index as a part: what it leaves behind when it is closed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from narseal.storage import Index, migrate
from tests.tools.waiting import PATIENCE


async def test_closing_waits_for_what_runs_though_its_callers_are_gone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/index.sqlite"
    migrate(url)
    before = set(threading.enumerate())
    index = Index(url, "/nix/store")
    running = asyncio.create_task(index.run())
    asks: list[asyncio.Task[object]] = [
        asyncio.create_task(index.nar(f"{n}.nar")) for n in range(50)
    ]
    asks += [asyncio.create_task(index.stored_bytes()) for _ in range(50)]
    await asyncio.sleep(0.001)
    for ask in asks:
        ask.cancel()
    await index.close()
    await asyncio.wait_for(running, PATIENCE)
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()
