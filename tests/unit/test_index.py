"""The index as a part: what it leaves behind when it is closed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from sqlalchemy import func, literal, select

from narseal.storage import Index, migrate
from narseal.storage.engine import Engines
from narseal.storage.presence import Presence
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


async def test_nobody_waits_for_a_survey(tmp_path: Path) -> None:
    """Of some million rows: points are read, other questions asked and writes committed meanwhile."""
    url = f"sqlite:///{tmp_path}/index.sqlite"
    migrate(url)
    numbers = select(literal(1).label("i")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.i + 1).where(numbers.c.i < 6_000_000))
    engines = Engines(url, Presence(tmp_path / "index.sqlite"))
    running = asyncio.create_task(engines.run())
    surveys = [asyncio.create_task(engines.survey(select(func.sum(numbers.c.i)))) for _ in range(2)]
    await asyncio.sleep(0)  # both are with their thread
    assert await engines.ask(select(literal(1))) == [(1,)]
    assert await engines.write(lambda c: c.scalar(select(literal(2)))) == 2
    assert await engines.write_long(lambda c: c.scalar(select(literal(3)))) == 3
    assert not any(survey.done() for survey in surveys)
    [[first], [second]] = await asyncio.gather(*surveys)
    assert first == second
    await engines.close()
    await asyncio.wait_for(running, PATIENCE)
