"""One 100 MB NAR: from storage, and through a cold relay."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from collections import defaultdict
from pathlib import Path

from tests.bench.floor import FLOOR, keeping_relay
from tests.bench.servers import ALL_CORES, download, median, nginx, pinned_narseal
from tests.bench.table import Row
from tests.tools.cache import Entry, entry, write_cache
from tests.tools.narseal import UPSTREAM, narseal_process

_SIZE = 100 << 20
_ROUNDS = 7
_FEW = 3
_GIGABIT = 125_000_000  # bytes a second


def measure_storage() -> list[Row]:
    """Against nginx with sendfile serving the same file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        item = _big("stored")
        write_cache(folder / "cache", item)
        with (
            pinned_narseal(folder / "n", {"url": f"file://{folder}/cache"}) as proxy,
            nginx(f"root {folder}/n/storage;") as static,
        ):
            urllib.request.urlopen(f"{proxy.url}/{item.hash}.narinfo").read()
            download(f"{proxy.url}/{item.info.url}")
            while not (folder / "n/storage" / f"{item.hash}.narinfo").exists():
                pass
            ours, theirs = [], []
            for _ in range(_ROUNDS):
                ours.append(download(f"{proxy.url}/{item.info.url}"))
                theirs.append(download(f"{static}/{item.info.url}"))
    return [_row("100 MB NAR from storage, against nginx static", ours, theirs, "≥ 0.9")]


def measure_relay() -> list[Row]:
    """Against nginx's proxy_pass to the same upstream; a fresh NAR each time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        items = [_big(f"cold{n}") for n in range(_ROUNDS)]
        write_cache(folder / "cache", *items)
        tuned = "proxy_buffers 64 64k; proxy_buffer_size 64k; proxy_max_temp_file_size 0;"
        http = "proxy_http_version 1.1; proxy_set_header Connection '';"
        with (
            nginx(f"root {folder}/cache;", ALL_CORES) as upstream,
            nginx(f"location / {{ proxy_pass {upstream}; {http} }}", ALL_CORES) as default,
            nginx(f"location / {{ proxy_pass {upstream}; {http} {tuned} }}", ALL_CORES) as best,
            narseal_process(folder / "n", {"url": upstream}) as proxy,
            keeping_relay(upstream, folder) as least,
        ):
            sides = {"default": default, "best": best, "least": least, "ours": proxy.url}
            times: dict[str, list[float]] = defaultdict(list)
            for item in items:
                urllib.request.urlopen(f"{proxy.url}/{item.hash}.narinfo").read()
                for side, url in sides.items():
                    os.sync()  # what the one before wrote is nobody else's time
                    times[side].append(download(f"{url}/{item.info.url}"))
        with (
            nginx(f"root {folder}/cache; limit_rate {_GIGABIT};", ALL_CORES) as upstream,
            nginx(f"location / {{ proxy_pass {upstream}; {http} }}", ALL_CORES) as relay,
            narseal_process(folder / "far", {"url": upstream}) as proxy,
        ):
            limited, by_relay = [], []
            for item in items[:_FEW]:
                urllib.request.urlopen(f"{proxy.url}/{item.hash}.narinfo").read()
                by_relay.append(download(f"{relay}/{item.info.url}"))
                limited.append(download(f"{proxy.url}/{item.info.url}"))
    ours = times["ours"]
    return [
        _row("100 MB NAR through a cold relay, hashed and kept, against proxy_pass with its"
             " default buffers", ours, times["default"], "≥ 0.8"),
        _row("the same against proxy_pass with large buffers and no temporary file", ours,
             times["best"], ""),
        _row(f"the same against {FLOOR}", ours, times["least"], ""),
        _row("the same from an upstream of 1 Gbit/s, against proxy_pass with its default buffers",
             limited, by_relay, "1"),
    ]  # fmt: skip


def _big(name: str) -> Entry:
    return entry(name, os.urandom(_SIZE), compression="none").signed(UPSTREAM)


def _row(what: str, ours: list[float], theirs: list[float], aim: str) -> Row:
    rate, other = (_SIZE / median(seconds) / 1e9 for seconds in (ours, theirs))
    return Row(what, f"{rate:.2f} GB/s", f"{other:.2f} GB/s", rate / other, aim)
