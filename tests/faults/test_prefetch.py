"""References that are fetched in advance, where content comes first."""

from __future__ import annotations

from pathlib import Path

import pytest

from narseal.pipeline.paths import admission
from tests.tools.cache import Entry, entry
from tests.tools.narseal import metric, narseal
from tests.tools.upstream import FakeCache

_MOST = 20


def chain(length: int) -> list[Entry]:
    """Each refers to the next one."""
    items = [entry("link-0", compression="none")]
    for number in range(1, length):
        below = items[-1].info.store_path
        contents = below.full("/nix/store").encode()
        items.append(entry(f"link-{number}", contents, compression="none", references=(below,)))
    return items[::-1]


async def test_references_without_end_are_followed_so_far_and_no_further(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question had everything fetched that an upstream made up."""
    monkeypatch.setattr(admission, "_MOST_PREFETCHED", _MOST)
    items = chain(4 * _MOST)
    upstream.add(*items)
    there = {"url": upstream.url, "verify": "content", "public_keys": []}
    async with narseal(tmp_path, there) as client:
        for first in (0, _MOST + 1):  # each question has its own
            stopped = metric("narseal_prefetch_stopped_total")
            await client.narinfo(items[first].hash)
            await client.until(
                lambda stopped=stopped: metric("narseal_prefetch_stopped_total") > stopped  # type: ignore[misc]
            )
            asked = [upstream.asked[f"{item.hash}.narinfo"] for item in items]
            last = first + _MOST
            assert asked == [1] * (last + 1) + [0] * (len(items) - last - 1)
