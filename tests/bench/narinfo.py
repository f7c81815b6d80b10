"""Cached narinfo requests a second, one core for the server."""

from __future__ import annotations

import tempfile
import urllib.request
from pathlib import Path

from tests.bench.servers import median, nginx, pinned_narseal, wrk
from tests.bench.table import Row
from tests.tools.cache import entry, write_cache
from tests.tools.narseal import UPSTREAM


def measure() -> list[Row]:
    """narseal beside nginx serving the same bytes, from a file and from memory, in turns."""
    item = entry("item").signed(UPSTREAM)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_cache(folder / "cache", item)
        target = f"{item.hash}.narinfo"
        with pinned_narseal(folder / "n", {"url": f"file://{folder}/cache"}) as proxy:
            text = urllib.request.urlopen(f"{proxy.url}/{target}").read()
            (folder / "cache" / target).write_bytes(text)
            literal = text.decode().replace("\n", "\\n")
            with (
                nginx(f"root {folder}/cache;") as files,
                nginx(f"root {folder}/cache; open_file_cache max=1000;") as tuned,
                nginx(f"location / {{ return 200 '{literal}'; }}") as memory,
            ):
                rates: dict[str, list[float]] = {"ours": [], "files": [], "tuned": [], "memory": []}
                for _ in range(3):
                    rates["ours"].append(wrk(f"{proxy.url}/{target}"))
                    rates["files"].append(wrk(f"{files}/{target}"))
                    rates["tuned"].append(wrk(f"{tuned}/{target}"))
                    rates["memory"].append(wrk(f"{memory}/{target}"))
    ours = median(rates["ours"])
    what = "cached narinfo, requests/s, one core, against nginx"
    return [
        Row(f"{what} {how}", f"{ours:,.0f}", f"{median(rates[kind]):,.0f}",
            ours / median(rates[kind]), aim)
        for kind, how, aim in (
            ("files", "static", "≥ 1.5"),
            ("tuned", "static with `open_file_cache`", ""),
            ("memory", "from memory (`return`)", ""),
        )
    ]  # fmt: skip
