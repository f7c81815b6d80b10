"""A server that does for a cold narinfo only what cannot be left out, to say what the rest costs.

It asks its upstream, parses, verifies one signature, signs, commits the pin and answers: narseal's own
parts, one after another. It has no policy, revocations, flights, fair turns, second upstream, memory
or folder, and no errors.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from nacl.signing import SigningKey
from yarl import URL

from narseal.nix.keyring import KeyRing
from narseal.nix.keys import PublicKey, Signature
from narseal.nix.narinfo import NarInfo
from narseal.storage import Index, NarRecord, PathRecord, migrate
from narseal.upstream.plain import Client, Place


@contextmanager
def floor(upstream: str, folder: Path, trusted: PublicKey) -> Iterator[tuple[str, int]]:
    """Its URL and process id."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(upstream, folder, str(trusted), theirs))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}", process.pid or 0
    finally:
        process.terminate()
        process.join()


def _serve(upstream: str, folder: Path, trusted: str, pipe: object) -> None:
    uvloop.run(_run(upstream, folder, KeyRing.of([PublicKey.parse(trusted)]), pipe))


async def _run(upstream: str, folder: Path, ring: KeyRing, pipe: object) -> None:
    url = f"sqlite:///{tempfile.mkdtemp(dir=folder)}/index.sqlite"
    migrate(url)
    server = _Floor(upstream, Index(url, "/nix/store"), ring)
    running = asyncio.create_task(server.index.run())
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: _Connection(server), "127.0.0.1", 0)
    pipe.send(listening.sockets[0].getsockname()[1])  # type: ignore[attr-defined]
    await running


class _Floor:
    def __init__(self, upstream: str, index: Index, ring: KeyRing) -> None:
        self.index = index
        self._upstream = upstream
        self._ring = ring
        self._client = Client(ssl.create_default_context(), connect_timeout=5)
        self._place = Place(URL(upstream), {})
        self._key = SigningKey.generate()

    async def narinfo(self, target: str) -> bytes:
        with await self._client.ask(self._place, target) as answer:
            info = NarInfo.parse(await answer.read())
        message = info.fingerprint()
        assert self._ring.signer(message, info.signatures)
        ours = Signature("floor-1", self._key.sign(message).signature)
        signed = info.with_signatures((*info.signatures, ours))
        nar = NarRecord.of(info, self._upstream)
        record = PathRecord(signed, nar.file, "signature", ours=frozenset(("floor-1",)))
        await self.index.admit(record, nar)
        body = signed.render()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class _Connection(asyncio.Protocol):
    def __init__(self, server: _Floor) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._task = asyncio.ensure_future(self._answer(data.split(b" ", 2)[1].decode()))

    async def _answer(self, target: str) -> None:
        answer = await self._server.narinfo(target)
        if self._transport:
            self._transport.write(answer)
