"""What grows with the index: starting, probes and pages, rotation, `narseal index check`.

GROWTH_PATHS says how many paths the index has (1,000,000 take 6 GB and some minutes), GROWTH_FILES how many of
them have their files in the folder (5,000,000 without: 5 GB), GROWTH_STEPS what is measured.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import aiohttp

from narseal.custody import write_private
from narseal.nix.base32 import encode
from narseal.nix.cache_info import CacheInfo
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import References, StorePath
from narseal.storage import LocalStorage, NarRecord, PathRecord, join
from narseal.storage.records import nar_values, path_values
from tests.bench.servers import cpu_seconds, median, nginx
from tests.bench.table import Row
from tests.tools.cache import entry, key, write_cache
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    Process,
    narseal_process,
    render_toml,
    settings,
)

_PATHS = int(os.environ.get("GROWTH_PATHS", "100000"))
_FILES = min(_PATHS, int(os.environ.get("GROWTH_FILES", "1000000")))
_STEPS = os.environ.get("GROWTH_STEPS", "start check rotation").split()
_NEW = key("operator-2")
_LINKS = 30_000  # of one file, which file systems bound
_ASKED = 20
_COLD = 200
_LONGEST = 120.0  # seconds of a rotation that are watched
_GROUP = 10_000
_NO_SCRUB = {"scrub_rate": 0}  # it would find that the NARs have no content


def measure() -> list[Row]:
    """Seconds, milliseconds, and paths a second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        _build(folder)
        (folder / "narseal.toml").write_text(render_toml(settings(folder)))
        cold = [entry(f"cold{n}", b"%d" % n).signed(UPSTREAM) for n in range(2 * _COLD)]
        write_cache(folder / "cache", *cold)
        names = iter([f"{item.hash}.narinfo" for item in cold])
        with nginx(f"root {folder}/cache;", {0, 1}) as upstream:
            steps: dict[str, Callable[[], list[Row]]] = {
                "start": lambda: _started(folder, upstream, names),
                "check": lambda: _checked(folder),
                "rotation": lambda: _rotated(folder, upstream, names),
            }
            return [row for step in _STEPS for row in steps[step]()]


def _started(folder: Path, upstream: str, names: Iterator[str]) -> list[Row]:
    rows = []
    for pages in ("cold", "warm"):
        if pages == "cold":
            _forget(folder / "index.sqlite")
        begun = time.monotonic()
        with narseal_process(folder, {"url": upstream}, storage=_NO_SCRUB) as proxy:
            took = time.monotonic() - begun
            rows.append(_row(f"start, the index's pages {pages}", f"{took:.2f} s", "< 3 s"))
            if pages == "cold":
                rows += [_asked(proxy, path) for path in ("readyz", "status", "metrics", "")]
                rows.append(_cold(proxy, names, "after the start"))
    return rows


def _asked(proxy: Process, path: str) -> Row:
    took = []
    for _ in range(_ASKED):
        start = time.perf_counter()
        urllib.request.urlopen(f"{proxy.url}/{path}").read()
        took.append((time.perf_counter() - start) * 1000)
    text = f"{median(took):.1f} ms, worst {max(took):.1f}"
    return _row(f"`/{path}`, {_ASKED} times just after the start", text, "< 100 ms")


def _cold(proxy: Process, names: Iterator[str], when: str) -> Row:
    """The median of narinfos that nobody asked for before, one after another."""

    async def ask() -> list[float]:
        took = []
        async with aiohttp.ClientSession() as session:
            for name in islice(names, _COLD):
                start = time.perf_counter()
                async with session.get(f"{proxy.url}/{name}") as response:
                    assert response.status == 200, await response.text()
                took.append((time.perf_counter() - start) * 1000)
        return took

    took = asyncio.run(ask())
    return _row(f"a cold narinfo, p50, {when}", f"{median(took):.1f} ms, worst {max(took):.0f}", "")


def _checked(folder: Path) -> list[Row]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    command = [sys.executable, "-m", "narseal", "index", "check", "--config"]
    done = subprocess.run([*command, folder / "narseal.toml"], capture_output=True, text=True)
    took = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr[-2000:]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text = f"{_PATHS / took:,.0f}/s ({took:.1f} s, {cpu / _PATHS * 1e6:.0f} µs CPU each)"
    return [_row("paths that `narseal index check` checks", text, "≥ 16,700/s")]


def _rotated(folder: Path, upstream: str, names: Iterator[str]) -> list[Row]:
    write_private(folder / "new.secret", _NEW.render())
    urls = [f"file:{folder}/operator.secret", f"file:{folder}/new.secret"]
    signing = {"key": [{"url": url} for url in urls], "resign_rate": 1e6}
    more = {"signing": signing, "storage": _NO_SCRUB}
    with narseal_process(folder, {"url": upstream}, **more) as proxy:

        def lacking() -> int:
            text = urllib.request.urlopen(f"{proxy.url}/status").read()
            return int(json.loads(text)["lackSignatures"])

        while (first := lacking()) == _PATHS:  # what is looked at before comes first
            time.sleep(0.01)
        start, spent = time.monotonic(), cpu_seconds(proxy.workers()[0])
        beside = _cold(proxy, names, "beside a rotation")
        left = first
        while left and time.monotonic() - start < _LONGEST:
            time.sleep(0.2)
            left = lacking()
        took, cpu = time.monotonic() - start, cpu_seconds(proxy.workers()[0]) - spent
        count = first - left
    text = f"{count / took:,.0f}/s ({cpu / max(1, count) * 1e3:.2f} ms CPU each)"
    return [_row("paths that a rotation signs and publishes", text, "≥ 2,000/s a core"), beside]


def _row(what: str, text: str, aim: str) -> Row:
    return Row(f"{_PATHS:,} paths: {what}", text, "", None, aim)


def _build(folder: Path) -> None:
    """An index and its folder as narseal leaves them: each row signed, each narinfo there."""
    url = f"sqlite:///{folder}/index.sqlite"
    storage = LocalStorage(f"file://{folder}/storage")
    join(url, storage, CacheInfo("/nix/store"))
    index = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    for pragma in ("synchronous=OFF", "cache_size=-1000000", "wal_autocheckpoint=100000"):
        index.execute(f"PRAGMA {pragma}")
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    indexes = index.execute(query).fetchall()
    for name, _ in indexes:
        index.execute(f"DROP INDEX {name}")
    made = map(_made, range(_PATHS))
    number = 0
    while group := list(islice(made, _GROUP)):
        index.execute("BEGIN")
        _insert(index, "nar", [nar_values(nar) for _, nar in group])
        _insert(index, "path", [path_values(path) for path, _ in group])
        index.execute("COMMIT")
        for path, nar in group:
            if nar.stored:
                _write(folder / "storage", path, nar, number)
            number += 1
    for _, sql in indexes:
        index.execute(sql)
    index.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    index.close()
    os.sync()


def _made(number: int) -> tuple[PathRecord, NarRecord]:
    """A path, and its NAR, of which the folder has all but the content."""
    digest = hashlib.sha256(b"%d" % number).digest()
    file_hash = Hash("sha256", digest[::-1])
    path = StorePath(encode(digest[:20]), f"package-{number}-1.0")
    others = (hashlib.sha256(b"%d" % (number // n)).digest()[:20] for n in (2, 3, 5))
    references = {StorePath(encode(other), "library-2.4") for other in others} - {path}
    info = NarInfo(
        store_dir="/nix/store",
        store_path=path,
        url=f"nar/{file_hash.nix32}.nar.xz",
        compression="xz",
        nar_hash=Hash("sha256", digest),
        nar_size=4096 + number,
        file_hash=file_hash,
        file_size=_SIZE,
        references=References(
            {r.hash_part: r for r in references if r.hash_part != path.hash_part}.values()
        ),
    )
    message = info.fingerprint()
    info = info.with_signatures(tuple(sorted([UPSTREAM.sign(message), OPERATOR.sign(message)])))
    nar = NarRecord(
        f"{file_hash.nix32}.nar.xz", info.nar_hash, info.nar_size, "xz", file_hash, _SIZE,
        "http://127.0.0.1:1", info.url, stored=number < _FILES,
    )  # fmt: skip
    ours = frozenset({OPERATOR.public.name})
    return PathRecord(info, nar.file, f"signature {UPSTREAM.public.name}", ours=ours), nar


_SIZE = 100


def _write(storage: Path, path: PathRecord, nar: NarRecord, number: int) -> None:
    with open(f"{storage}/{path.info.store_path.hash_part}.narinfo", "wb") as file:
        file.write(path.info.render())
    first = storage / f"nar/{number // _LINKS}"
    if not number % _LINKS:
        first.write_bytes(bytes(_SIZE))
    os.link(first, f"{storage}/nar/{nar.file}")


def _insert(index: sqlite3.Connection, table: str, rows: list[dict[str, object]]) -> None:
    names = ", ".join(rows[0])
    values = ", ".join(f":{name}" for name in rows[0])
    index.executemany(f"INSERT INTO {table} ({names}) VALUES ({values})", rows)


def _forget(file: Path) -> None:
    """Have the system let go of a file's pages."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
