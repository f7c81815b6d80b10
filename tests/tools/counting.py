"""Which calls prometheus_client makes while cold paths are served, but for gauges and for `flush`.

`python -m tests.tools.counting <folder>`, in a process of its own: it puts itself in the place of
os.getpid and of the mapped files' writing before anything imports them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATHS = 20


def main(folder: Path) -> None:
    """Prints what was called from where, by name; and how many paths were served meanwhile."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(dir=folder)
    calls: Counter[str] = Counter()
    apart: set[object] = set()

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            frame = sys._getframe(1)
            if frame.f_globals["__name__"].startswith("prometheus_client."):
                code = {frame.f_code}
                while frame.f_back:
                    frame = frame.f_back
                    code.add(frame.f_code)
                calls[name if apart.isdisjoint(code) else f"{name}, apart"] += 1
            return call(*arguments)

        return count

    os.getpid = counted(os.getpid, "getpid")
    from prometheus_client import Gauge, mmap_dict

    mmap_dict.MmapedDict.write_value = counted(mmap_dict.MmapedDict.write_value, "write")  # type: ignore[method-assign]
    from narseal.telemetry.series import flush

    apart |= {flush.__code__, Gauge.set.__code__}
    warmed, in_all = asyncio.run(_serve(folder, calls))
    print(json.dumps({"cold": in_all - warmed, "in all": in_all}))


async def _serve(folder: Path, calls: Counter[str]) -> tuple[Counter[str], Counter[str]]:
    """What was called when the first path was served, and the others."""
    from tests.tools.cache import entry, write_cache
    from tests.tools.narseal import UPSTREAM, narseal

    items = [entry(f"item{n}", b"%d" % n * 5_000).signed(UPSTREAM) for n in range(PATHS + 1)]
    write_cache(folder / "cache", *items)
    async with narseal(folder, {"url": f"file://{folder}/cache"}) as client:
        warmed: Counter[str] = Counter()
        for item in items:
            info = await client.narinfo(item.hash)
            assert (await client.get(info.url))[:2] == (200, item.file)
            # until it is published, so that what is counted then is in it
            await client.until(lambda url=info.url: url in client.published())  # type: ignore[misc]
            warmed = warmed or calls.copy()
        return warmed, calls.copy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
