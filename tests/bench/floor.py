"""A server that does for cold paths and uploads only what cannot be left out, to say what the rest costs.

A narinfo: it asks its upstream, parses, verifies one signature, signs, commits the pin and answers. A NAR:
it fetches it, holds it to its narinfo, answers, and writes and records it behind that, in groups. An upload:
it writes and hashes the NAR, holds it to its narinfo, synchronises it, signs, commits, and writes the narinfo
behind the answer. What was answered once is answered from memory. All with narseal's own parts, one after another: no policy, tokens, revocations, flights,
fair turns, second upstream, memory of answers, bounds, metrics or errors.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import socket
import ssl
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import httptools
import uvloop
from nacl.signing import SigningKey
from yarl import URL

from narseal.nix.cache_info import CacheInfo
from narseal.nix.hashes import Hash
from narseal.nix.inspection import Measured, inspect_file
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.narinfo import NarInfo
from narseal.runtime.batching import Batcher
from narseal.runtime.files import OpenFile
from narseal.storage import Index, LocalStorage, NarRecord, PathRecord, migrate
from narseal.upstream.plain import Client, Place

#: What its rows are called.
FLOOR = "what cannot be left out (tests/bench/floor.py)"
_TOGETHER = 64
_BLOCK = 256 << 10  # bytes that a relay takes at a time
_RELAYED = 8  # blocks that wait to be hashed
_GATHERING = 0.05  # seconds, of what is written behind the answer
T = TypeVar("T")
B = TypeVar("B", bytes, memoryview)


@contextmanager
def floor(upstream: str, folder: Path, trusted: PublicKey) -> Iterator[tuple[str, int, str]]:
    """Its URL, process id and public key."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(upstream, folder, str(trusted), theirs))
    process.start()
    try:
        port, key = ours.recv()
        yield f"http://127.0.0.1:{port}", process.pid or 0, key
    finally:
        process.terminate()
        process.join()


@contextmanager
def keeping_relay(upstream: str, folder: Path) -> Iterator[str]:
    """Its URL; a relay of one large file after another, which hashes and keeps what it sends.

    One thread takes and sends, another hashes and writes; the last block is sent when the hash is known.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_relay, args=(URL(upstream), folder, theirs))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _relay(upstream: URL, folder: Path, pipe: object) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pipe.send(listening.getsockname()[1])  # type: ignore[attr-defined]
        while True:
            client, _ = listening.accept()
            with (
                client,
                socket.create_connection((str(upstream.host), upstream.port)) as source,
                tempfile.TemporaryFile(dir=folder, buffering=0) as kept,
                ThreadPoolExecutor(1) as behind,
            ):
                request, _ = _head(client)
                source.sendall(request)
                head, begin = _head(source)
                client.sendall(head)
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                _pass_on(source, client, length, memoryview(begin), kept, behind)


def _pass_on(
    source: socket.socket,
    client: socket.socket,
    length: int,
    block: memoryview,
    kept: IO[bytes],
    behind: ThreadPoolExecutor,
) -> None:
    digest = hashlib.sha256()

    def hash_and_keep(block: memoryview) -> None:
        digest.update(block)
        kept.write(block)

    under_way: deque[Future[None]] = deque()
    while True:
        length -= len(block)
        under_way.append(behind.submit(hash_and_keep, block))
        while len(under_way) > (_RELAYED if length else 0):
            under_way.popleft().result()
        client.sendall(block)
        if not length:
            return
        buffer = memoryview(bytearray(min(_BLOCK, length)))
        block = _received(buffer[: source.recv_into(buffer)])


def _received(data: B) -> B:
    if not data:
        raise EOFError("the other side ended early")
    return data


def _head(sock: socket.socket) -> tuple[bytes, bytes]:
    """A request's or an answer's head, and what came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(sock.recv(1 << 16))
    head, end, rest = data.partition(b"\r\n\r\n")
    return head + end, rest


def _serve(upstream: str, folder: Path, trusted: str, pipe: object) -> None:
    uvloop.run(_run(upstream, folder, KeyRing.of([PublicKey.parse(trusted)]), pipe))


async def _run(upstream: str, folder: Path, ring: KeyRing, pipe: object) -> None:
    home = tempfile.mkdtemp(dir=folder)
    url = f"sqlite:///{home}/index.sqlite"
    migrate(url)
    storage = LocalStorage(f"file://{home}/storage")
    storage.prepare(CacheInfo("/nix/store"))
    server = _Floor(upstream, Index(url, "/nix/store"), storage, ring)
    listening = await asyncio.get_running_loop().create_server(
        lambda: _Connection(server), "127.0.0.1", 0, backlog=1024
    )
    port = listening.sockets[0].getsockname()[1]
    public = PublicKey("floor-1", bytes(server.key.verify_key))
    pipe.send((port, str(public)))  # type: ignore[attr-defined]
    async with asyncio.TaskGroup() as group:
        for work in (server.index.run, server.publishing.run, server.write_behind):
            group.create_task(work())


class _Floor:
    def __init__(self, upstream: str, index: Index, storage: LocalStorage, ring: KeyRing) -> None:
        self.index = index
        self.key = SigningKey.generate()
        self.publishing: Batcher[tuple[OpenFile, str], None] = Batcher(
            self._publish, most=_TOGETHER
        )
        self._upstream = upstream
        self._storage = storage
        self._ring = ring
        self._client = Client(ssl.create_default_context(), connect_timeout=5)
        self._place = Place(URL(upstream), {})
        self._known: dict[str, tuple[NarInfo, NarRecord]] = {}
        self._uploaded: dict[str, OpenFile] = {}
        self._answered: dict[str, bytes] = {}
        #: What is written behind the answer: NARs, which their narinfos follow.
        self._nars: dict[str, bytes] = {}
        self._narinfos: dict[str, bytes] = {}
        self._threads = ThreadPoolExecutor(8)

    def _thread(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def answer(self, method: str, name: str, body: bytes) -> tuple[int, bytes]:
        """Status and body."""
        if method == "PUT":
            if name.endswith(".narinfo"):
                await self._put_narinfo(body)
            elif name.startswith("nar/"):
                self._uploaded[name] = await self._thread(self._received, name, body)
            return 201, b""
        if name == "nix-cache-info":
            return 200, CacheInfo("/nix/store").render().encode()
        if not self._upstream:
            return 404, b""
        if name not in self._answered:
            find = self._nar if name.startswith("nar/") else self._narinfo
            self._answered[name] = await find(name)
        return 200, self._answered[name]

    async def _narinfo(self, name: str) -> bytes:
        with await self._client.ask(self._place, f"/{name}") as answer:
            info = NarInfo.parse(await answer.read())
        assert self._ring.signer(info.fingerprint(), info.signatures)
        signed = self._signed(info)
        nar = NarRecord.of(info, self._upstream)
        record = PathRecord(signed, nar.file, "signature", ours=frozenset(("floor-1",)))
        await self.index.admit(record, nar)
        self._known[info.url] = signed, nar
        return signed.render()

    def _signed(self, info: NarInfo) -> NarInfo:
        ours = Signature("floor-1", self.key.sign(info.fingerprint()).signature)
        return info.with_signatures((*info.signatures, ours))

    async def _nar(self, name: str) -> bytes:
        info, _ = self._known[name]
        with await self._client.ask(self._place, f"/{name}") as answer:
            body = await answer.read()
        assert inspect_file(info, BytesIO(body)).file_hash == info.file_hash
        self._nars[name] = body
        return body

    def _received(self, name: str, body: bytes) -> OpenFile:
        assert name.startswith(f"nar/{Hash.sha256(body).nix32}.")
        file = OpenFile.incoming(self._storage.arriving())
        file.write(body)
        return file

    async def _put_narinfo(self, body: bytes) -> None:
        info = NarInfo.parse(body)
        file = self._uploaded.pop(info.url)

        def inspected() -> Measured:
            return inspect_file(info, BytesIO(file.read()), scan=True)

        found = await self._thread(inspected)
        await self.publishing.ask((file, info.url))
        name, signed = info.url.removeprefix("nar/"), self._signed(info)
        nar = NarRecord.from_file(info, name, file_hash=found.file_hash, file_size=found.file_size)
        path = PathRecord(signed, name, "upload x", ours=frozenset(("floor-1",)))
        await self.index.admit_stored(path, replace(nar, stored=True))
        self._narinfos[f"{info.store_path.hash_part}.narinfo"] = signed.render()

    async def _publish(self, files: list[tuple[OpenFile, str]]) -> list[Exception | None]:
        return list(await self._thread(self._storage.publish_each, files))

    async def write_behind(self) -> None:
        """Write what was answered, some together."""
        while True:
            await asyncio.sleep(_GATHERING)
            nars = dict(islice(self._nars.items(), _TOGETHER))
            if nars:
                await self._thread(self._storage.write_all, nars)
                known = [self._known[name] for name in nars]
                await asyncio.gather(
                    *(self.index.publish(nar, replace(nar, stored=True)) for _, nar in known)
                )
                for name, (info, _) in zip(nars, known, strict=True):
                    self._narinfos[f"{info.store_path.hash_part}.narinfo"] = info.render()
                    del self._nars[name]
            narinfos = dict(islice(self._narinfos.items(), _TOGETHER))
            if narinfos:
                await self._thread(partial(self._storage.write_all, narinfos, together=True))
                for name in narinfos:
                    del self._narinfos[name]


class _Connection(asyncio.Protocol):
    def __init__(self, server: _Floor) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._target = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._target = url

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        body = b"".join(self._body)
        self._body.clear()
        name = self._target.partition(b"?")[0].decode()[1:]
        self._task = asyncio.ensure_future(self._answer(method, name, body))

    async def _answer(self, method: str, name: str, body: bytes) -> None:
        status, answer = await self._server.answer(method, name, body)
        head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(answer))
        if self._transport:
            self._transport.write(head + (b"" if method == "HEAD" else answer))
