"""Running narseal: in this process for the many small tests, as the real command for the rest."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from prometheus_client import REGISTRY

from narseal.config import Config
from narseal.custody import write_private
from narseal.nix.cache_info import CacheInfo
from narseal.nix.narinfo import NarInfo
from narseal.server.worker import Stop, work
from narseal.storage import Epoch, LocalStorage, join
from narseal.telemetry.series import flush
from tests.tools.cache import key
from tests.tools.waiting import PATIENCE, eventually

OPERATOR = key("operator-1")
UPSTREAM = key("upstream-1")


def settings(folder: Path, *upstreams: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A configuration's tree with storage in `folder` and the operator's key in a file."""
    secret = folder / "operator.secret"
    if not secret.exists():
        write_private(secret, OPERATOR.render())
    tree: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "upstream": [{"public_keys": [str(UPSTREAM.public)]} | upstream for upstream in upstreams],
        "storage": {
            "url": f"file://{folder}/storage",
            "index": f"sqlite:///{folder}/index.sqlite",
        },
        "signing": {"key": [{"url": f"file:{secret}"}]},
        "limits": {"shutdown_timeout": "2s"},
    }
    for section, value in more.items():
        tree[section] = tree.get(section, {}) | value if isinstance(value, dict) else value
    return tree


class Client:
    """Asks a narseal over a real socket."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, storage: Path, stop: Stop | None = None
    ) -> None:
        self.url = url
        self.session = session
        self.storage = storage
        #: How its worker is told to end, if it is one of this process; it is at the end in any case.
        self.stop = stop or Stop()

    async def get(self, name: str, **options: Any) -> tuple[int, bytes, CIMultiDictProxy[str]]:
        """Status, body and headers; a broken body raises aiohttp.ClientPayloadError."""
        async with self.session.get(f"{self.url}/{name}", **options) as response:
            return response.status, await response.read(), response.headers

    async def head(self, name: str) -> tuple[int, CIMultiDictProxy[str]]:
        async with self.session.head(f"{self.url}/{name}") as response:
            return response.status, response.headers

    async def narinfo(self, hash_part: str) -> NarInfo:
        """A narinfo that must be there, parsed, and signed by the operator."""
        status, body, _ = await self.get(f"{hash_part}.narinfo")
        assert status == 200, (status, body)
        info = NarInfo.parse(body)
        assert is_countersigned(info), body
        return info

    async def refusal(self, name: str) -> str:
        """The reason of a 404 that must come."""
        status, body, headers = await self.get(name)
        assert status == 404, (status, body)
        return headers["X-Narseal-Reason"]

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for something that happens behind the answer."""

        async def met() -> object:
            return condition()

        await eventually(met)

    def published(self) -> set[str]:
        """Files of storage that a client of the folder could see."""
        return {
            str(path.relative_to(self.storage))
            for path in self.storage.rglob("*")
            if path.is_file() and ".narseal" not in path.parts and path.name != "nix-cache-info"
        }


def unclaimed(storage: Path) -> list[Path]:
    """Uploads that wait in a storage folder for their narinfos."""
    nars, others = storage / ".narseal/uploads", storage / ".narseal/waiting"
    return [*nars.iterdir(), *others.glob("*/*")]


def is_countersigned(info: NarInfo) -> bool:
    """Whether the operator's key signed just this narinfo."""
    message = info.fingerprint()
    return any(OPERATOR.public.verifies(message, signature) for signature in info.signatures)


def metric(name: str, **labels: str) -> float:
    """A sample of this process."""
    flush()
    return REGISTRY.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def narseal(folder: Path, *upstreams: dict[str, Any], **more: Any) -> AsyncIterator[Client]:
    """A worker in this process, on a socket of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(**settings(folder, *upstreams, **more))
    storage = LocalStorage(config.storage.url)
    join(config.storage.index, storage, CacheInfo(config.store_dir))
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    sock.setblocking(False)
    ready, stop = asyncio.Event(), Stop()
    task = asyncio.create_task(
        work(
            config,
            epoch=Epoch.of(config.storage.index),
            sockets=[sock],
            metrics_sockets=[],
            ready=ready.set,
            stop=stop,
        )
    )
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    try:
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=timeout
        ) as session:
            url = "http://{}:{}".format(*sock.getsockname())
            yield Client(url, session, folder / "storage", stop)
    finally:
        stop.now()
        await task


class Process:
    """The real command, `narseal serve`, with workers."""

    def __init__(self, process: subprocess.Popen[str], url: str, folder: Path, log: Path) -> None:
        self.process = process
        self.url = url
        self.folder = folder
        self.log = log

    @property
    def public_key(self) -> str:
        return str(OPERATOR.public)

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


@contextmanager
def narseal_process(folder: Path, *upstreams: dict[str, Any], **more: Any) -> Iterator[Process]:
    """`narseal serve` on a free port."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "narseal.toml"
    file.write_text(render_toml(settings(folder, *upstreams, **more)))
    log = folder / "log.jsonl"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "narseal", "serve", "--config", str(file)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        match = re.search(r"serves (\S+)", first)
        assert match, f"narseal did not start: {log.read_text()[-4000:]}"
        yield Process(process, match[1], folder, log)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.stdout is not None
        process.stdout.close()


def render_toml(tree: dict[str, Any]) -> str:
    """A configuration file; tables in lists one level deep are enough."""
    scalars, tables = [], []
    for name, value in tree.items():
        if isinstance(value, dict):
            inner = render_toml(value).replace("[[", f"[[{name}.")
            tables.append(f"[{name}]\n{inner}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables.extend(f"[[{name}]]\n{render_toml(item)}" for item in value)
        else:
            scalars.append(f"{name} = {_toml(value)}\n")
    return "".join(scalars) + "\n".join(tables)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    return (
        str(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False)
    )
