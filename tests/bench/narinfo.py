"""Cached narinfo requests a second, one core for the server."""

from __future__ import annotations

import tempfile
import urllib.request
from functools import partial
from pathlib import Path

from tests.bench.peers import harmonia, ncps
from tests.bench.servers import AT_HOST, HOST_KEY, SERVER_CORE, nginx, pinned_narseal, wrk
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.cache import entry, write_cache


def measure() -> list[Row]:
    """narseal beside nginx serving the same bytes, from a file and from memory, and the peers, in turns."""
    item = entry("item").signed(HOST_KEY)
    sides = Sides()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_cache(folder / "cache", item)
        target = f"{item.hash}.narinfo"
        there = {"url": f"file://{folder}/cache", "public_keys": [str(HOST_KEY.public)]}
        with (
            pinned_narseal(folder / "n", there) as proxy,
            nginx(f"root {folder}/cache; {AT_HOST}") as files,
            nginx(f"root {folder}/cache; open_file_cache max=1000;") as tuned,
            ncps(folder / "ncps", item.hash, SERVER_CORE) as peer,
            harmonia(files, f"/nix/store/{item.info.store_path}", SERVER_CORE) as local,
        ):
            text = urllib.request.urlopen(f"{proxy.url}/{target}").read()
            (folder / "cache" / target).write_bytes(text)
            literal = text.decode().replace("\n", "\\n")
            with nginx(f"location / {{ return 200 '{literal}'; }}") as memory:
                urls = {
                    "narseal": proxy.url, "nginx static": files,
                    "nginx static with `open_file_cache`": tuned,
                    "nginx from memory (`return`)": memory,
                } | {side: at.url for side, at in (("ncps", peer), ("harmonia", local)) if at}  # fmt: skip
                for _ in range(3):
                    for side, url in urls.items():
                        sides.take(side, "", partial(wrk, f"{url}/{target}"))
    besides = {
        "nginx static": "≥ 1.5", "nginx static with `open_file_cache`": "",
        "nginx from memory (`return`)": "", "ncps": "> 1", "harmonia": "> 1",
    }  # fmt: skip
    return sides.rows("cached narinfo, requests/s, one core", "", besides, "{:,.0f}")
