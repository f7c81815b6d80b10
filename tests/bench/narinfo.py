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
                nginx(f"location / {{ return 200 '{literal}'; }}") as memory,
            ):
                rates: dict[str, list[float]] = {"ours": [], "files": [], "memory": []}
                for _ in range(3):
                    rates["ours"].append(wrk(f"{proxy.url}/{target}"))
                    rates["files"].append(wrk(f"{files}/{target}"))
                    rates["memory"].append(wrk(f"{memory}/{target}"))
    ours, static, literal_rate = (median(rates[k]) for k in ("ours", "files", "memory"))
    return [
        Row("cached narinfo, requests/s, against nginx from a file", f"{ours:,.0f}",
            f"{static:,.0f}", ours / static, "≥ 1.5"),
        Row("the same against nginx from memory (`return`)", f"{ours:,.0f}",
            f"{literal_rate:,.0f}", ours / literal_rate, ""),
    ]  # fmt: skip
