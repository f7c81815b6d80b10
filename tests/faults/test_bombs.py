"""Small things that would grow large: a worker's memory and its loop are bounded under each.

Each row is one bomb: what an upstream, an uploader, a reader or an issuer sends. The figures of a
run are in the report of a failed test, and with `-s` of a good one.
"""

from __future__ import annotations

import asyncio
import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import brotli
import pytest
from aiohttp import web

from narseal.nix.base32 import encode
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath
from tests.faults.test_policy import OTHER, attested, by_ci, digest_of
from tests.faults.test_uploads import add
from tests.tools.cache import Entry, entry
from tests.tools.narseal import UPSTREAM, Process, narseal_process
from tests.tools.tls import self_signed
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually, until
from tests.tools.watching import Watched, resident, watching

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
GROWTH = 128 * MIB
STALL = 0.5  # seconds of the loop's CPU time; what these tests are about took 16 and more
ZEROS = bytes(MIB)
ITEM = entry("my-app-1", b"app", compression="zstd").signed(UPSTREAM)
LISTING = f"{'1' * 32}.ls"
EMPTY_FRAME = zstd.compress(b"")
WIDE = b'{"version":1,"root":{"entries":[' + b"[]," * (21 * MIB) + b"[]]}}"
DEEP = b'{"version":1,"root":' + b'{"a":' * (3 * MIB) + b"1" + b"}" * (3 * MIB) + b"}"


def log(number: int) -> str:
    return f"log/{encode(number.to_bytes(20, 'big'))}-x.drv"


def zeros(compress: Any, size: int) -> bytes:
    """`size` bytes of zeros through a compressor object, MiB by MiB."""
    return b"".join([*(compress.compress(ZEROS) for _ in range(size // MIB)), compress.flush()])


def brotli_zeros(size: int) -> bytes:
    compressor = brotli.Compressor(quality=5, lgwin=24)
    pieces = [compressor.process(ZEROS) for _ in range(size // MIB)]
    return b"".join([*pieces, compressor.finish()])


@dataclass
class World:
    """A narseal with one worker, its upstream, and a client with a token."""

    process: Process
    upstream: FakeCache
    session: aiohttp.ClientSession
    token: str

    async def get(self, name: str, **headers: str) -> tuple[int, int]:
        """Status and size."""
        size = 0
        async with self.session.get(f"{self.process.url}/{name}", headers=headers) as response:
            async for chunk in response.content.iter_any():
                size += len(chunk)
            return response.status, size

    async def put(self, name: str, data: Any, encoding: str = "identity") -> int:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Encoding": encoding}
        async with self.session.put(
            f"{self.process.url}/{name}",
            data=io.BytesIO(data) if isinstance(data, bytes) else data,
            headers=headers,
        ) as response:
            await response.read()
            return response.status

    def serve(self, name: str, body: bytes, encoding: str) -> None:
        self.upstream.files[name] = body
        self.upstream.headers[name] = {"Content-Encoding": encoding}

    def on_disk(self) -> int:
        """Bytes that the storage takes."""
        storage = self.process.folder / "storage"
        total = 0
        for file in storage.rglob("*"):
            with suppress(FileNotFoundError):
                status = file.stat()
                total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
        return total


@pytest.fixture
def quarantine_size() -> str:
    """Room for uploads on their way; a test may have its own."""
    return "128M"


@pytest.fixture
async def world(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch, quarantine_size: str
) -> AsyncIterator[World]:
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # tracing would be measured, too
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    upload["quarantine_size"] = quarantine_size
    upstream.add(ITEM)
    with narseal_process(
        tmp_path, {"url": upstream.url}, upload=upload, policy=[by_ci() | {"match": "guarded-*"}],
        limits={"side_files": "100M"},
    ) as process:  # fmt: skip
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield World(process, upstream, session, token)


Bomb = Callable[[World], Awaitable[None]]
BOMBS: dict[str, Bomb] = {}


def bomb(work: Bomb) -> Bomb:
    """A row of the table."""
    BOMBS[work.__name__] = work
    return work


def narinfo_of_upstream(name: str, encoding: str, make: Callable[[], bytes]) -> None:
    """A row: a narinfo that comes so encoded."""

    async def work(world: World) -> None:
        world.serve(f"{'2' * 32}.narinfo", make(), encoding)
        assert (await world.get(f"{'2' * 32}.narinfo"))[0] == 404

    BOMBS[name] = work


narinfo_of_upstream("narinfo of empty zstd frames", "zstd", lambda: EMPTY_FRAME * 500_000)
narinfo_of_upstream("narinfo of empty gzip members", "gzip", lambda: gzip.compress(b"") * 250_000)
narinfo_of_upstream("narinfo of empty bzip2 streams", "bzip2", lambda: bz2.compress(b"") * 350_000)
narinfo_of_upstream("narinfo of empty xz streams", "xz", lambda: lzma.compress(b"") * 150_000)
narinfo_of_upstream("narinfo: 4 GiB as zstd", "zstd", lambda: zeros(zstd.ZstdCompressor(), 4 << 30))
narinfo_of_upstream("narinfo: 1 GiB as brotli", "br", lambda: brotli_zeros(1 << 30))
narinfo_of_upstream("narinfo: 1 GiB as bzip2", "bzip2", lambda: zeros(bz2.BZ2Compressor(), 1 << 30))
narinfo_of_upstream(
    "narinfo: a dictionary of 1 GiB as lzma", "lzma",
    lambda: b"\x5d" + (1 << 30).to_bytes(4, "little") + b"\xff" * 8 + bytes(1000),
)  # fmt: skip
narinfo_of_upstream(
    "narinfo of signatures", "identity",
    lambda: ITEM.info.render() + b"Sig: upstream-1:AAAA\n" * 45_000,
)  # fmt: skip
narinfo_of_upstream(
    "narinfo of references", "identity",
    lambda: b"StorePath: /nix/store/x\nReferences:" + f" {'0' * 32}-a".encode() * 29_000 + b"\n",
)  # fmt: skip


def with_references(name: str) -> Entry:
    """A path with as many references as there may be."""
    references = tuple(
        StorePath(encode(hashlib.sha256(b"%d" % n).digest()[:20]), "p") for n in range(20_000)
    )
    return entry(name, b"x", compression="zstd", references=references)


@bomb
async def good_narinfos_of_20_000_references(world: World) -> None:
    items = [with_references(f"wide-{n}").signed(UPSTREAM) for n in range(24)]
    world.upstream.add(*items)
    names = [f"{item.hash}.narinfo" for item in items]

    async def had(name: str) -> bool:
        status, _ = await world.get(name)
        assert status in (200, 503)  # where too many come at a time
        return status == 200

    for _ in range(2):  # as they come, and as they are kept
        await asyncio.gather(*(eventually(partial(had, name)) for name in names))


@bomb
async def uploaded_narinfos_of_20_000_references(world: World) -> None:
    items = [with_references(f"up-{n}") for n in range(8)]
    for item in items:
        assert await world.put(item.info.url, item.file) == 201
    puts = (world.put(f"{item.hash}.narinfo", item.info.render()) for item in items)
    assert set(await asyncio.gather(*puts)) == {422}  # none of what they refer to is here


@bomb
async def realisations_with_many_dependents(world: World) -> None:
    body = realisation_with_dependents("b" * 64)
    name = f"realisations/sha256:{'b' * 64}!out.doi"
    world.upstream.files[name] = body
    puts = (world.put(name.replace("!", "%21"), body) for _ in range(16))
    assert set(await asyncio.gather(*puts)) == {422}  # of a path that is not here
    assert (await world.get(name.replace("!", "%21")))[0] == 404  # and nobody signed it


def realisation_with_dependents(digest: str) -> bytes:
    dependents = {f"sha256:{n:064x}!out": f"{'0' * 32}-p" for n in range(2200)}
    tree = {"id": f"sha256:{digest}!out", "outPath": f"{'1' * 32}-x", "signatures": []}
    return json.dumps(tree | {"dependentRealisations": dependents}).encode()


def listing_of_upstream(name: str, body: bytes) -> None:
    async def work(world: World) -> None:
        world.serve(LISTING, zstd.compress(body), "zstd")
        assert (await world.get(LISTING))[0] == 404
        assert await world.put(LISTING, zstd.compress(body), "zstd") in (413, 422)

    BOMBS[name] = work


listing_of_upstream("listing of 64 MiB of empty arrays", WIDE)
listing_of_upstream("listing of 15 MiB of empty arrays", WIDE[: 15 * MIB] + b"[]]}}")
listing_of_upstream("listing of deep objects", DEEP[: 12 * MIB])
listing_of_upstream("listing of one text", b'{"version":1,"root":"' + b"x" * 14 * MIB + b'"}')
listing_of_upstream("listing of one number", b'{"version":' + b"1" * 10 * MIB + b"}")


@bomb
async def forty_large_logs(world: World) -> None:
    """600 bytes each; they are passed on, and not all of them stay."""
    for number in range(40):
        world.serve(log(number), zstd.compress(bytes(20 * MIB)), "zstd")
    for start in range(0, 40, 10):
        answers = await asyncio.gather(*(world.get(log(start + n)) for n in range(10)))
        assert set(answers) == {(200, 20 * MIB)}
    # what was on its way goes with its last reader
    await asyncio.to_thread(until, lambda: world.on_disk() < 110 * MIB)


@bomb
async def logs_larger_than_may_be(world: World) -> None:
    names = [log(100 + n) for n in range(10)]
    for name in names:
        world.serve(name, zeros(bz2.BZ2Compressor(), 256 * MIB), "bzip2")
    assert {status for status, _ in await asyncio.gather(*map(world.get, names))} == {404}


@bomb
async def a_log_in_chunks_of_one_byte(world: World) -> None:
    async def fault(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        request.transport.write(head)
        for _ in range(40):
            request.transport.write(b"1\r\nx\r\n" * 25_000)
            await asyncio.sleep(0)
        request.transport.write(b"0\r\n\r\n")
        return web.Response()

    world.upstream.fault(log(200), fault)
    assert await world.get(log(200)) == (200, 1_000_000)


@bomb
async def an_uploaded_log_in_chunks_of_one_byte(world: World) -> None:
    host, port = world.process.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"PUT /{log(201)} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: Bearer {world.token}\r\n\r\n"
    )
    writer.write(head.encode())
    for _ in range(40):
        writer.write(b"1\r\nx\r\n" * 25_000)
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 201")
    writer.close()


@bomb
async def readers_of_a_large_log_who_take_nothing(world: World) -> None:
    world.serve(log(300), zstd.compress(bytes(60 * MIB)), "zstd")
    assert await world.get(log(300)) == (200, 60 * MIB)
    async with asyncio.TaskGroup() as group:
        lines = [await _slow_reader(world, log(300)) for _ in range(16)]
        for _, writer in lines:
            group.create_task(_close(writer))


@bomb
async def uploaded_narinfo_of_empty_frames(world: World) -> None:
    assert await world.put(f"{ITEM.hash}.narinfo", EMPTY_FRAME * 100_000, "zstd") in (413, 422)


@bomb
async def uploaded_logs(world: World) -> None:
    """Of 60 MiB each when they are decoded, where 128 MiB may be on their way."""
    body = zeros(zstd.ZstdCompressor(), 60 * MIB)
    answers = await asyncio.gather(*(world.put(log(400 + n), body, "zstd") for n in range(8)))
    assert set(answers) <= {201, 507} and 507 in answers


@bomb
async def uploaded_attestation_of_empty_arrays(world: World) -> None:
    body = b'{"mediaType":[' + b"[]," * (2 * MIB) + b"[]]}"
    names = [f"attestations/{digest_of(OTHER)}"] * 8
    answers = await asyncio.gather(*(world.put(n, zstd.compress(body), "zstd") for n in names))
    assert set(answers) == {422}


@bomb
async def uploaded_attestations_of_one_large_text(world: World) -> None:
    bundles = [attested(OTHER, note=f"{n}" + "x" * (5 * MIB)) for n in range(4)]
    name = f"attestations/{digest_of(OTHER)}"
    answers = await asyncio.gather(*(world.put(name, b) for b in bundles))
    assert set(answers) == {201}


@bomb
async def uploaded_realisation_of_empty_arrays(world: World) -> None:
    name = f"realisations/sha256:{'a' * 64}!out.doi"
    body = b'{"id":[' + b"[]," * 80_000 + b"[]]}"
    assert await world.put(name.replace("!", "%21"), body) == 422


@bomb
async def uploaded_nar_of_empty_frames(world: World) -> None:
    file = EMPTY_FRAME * 500_000
    name = f"nar/{Hash.sha256(file).nix32}.nar.zst"
    assert await world.put(name, file) == 201
    item = entry("uploaded-1", b"small", compression="zstd")
    made = item.but(url=name, file_hash=Hash.sha256(file), file_size=len(file))
    assert await world.put(f"{item.hash}.narinfo", made.info.render()) == 422


@bomb
async def nar_of_an_upstream_that_is_larger_than_it_says(world: World) -> None:
    honest = entry("lying-1", b"small").signed(UPSTREAM)
    item = honest.but(compression="br", url="nar/x.nar.br", file_hash=None, file_size=None)
    item = Entry(item.info, item.nar, brotli_zeros(1 << 30)).signed(UPSTREAM)
    world.upstream.add(item)
    assert (await world.get(f"{item.hash}.narinfo"))[0] == 200
    text = (await _text(world, f"{item.hash}.narinfo")).split("URL: ")[1].split("\n")[0]
    assert (await world.get(text))[0] in (404, 502)


async def _open(
    world: World, data: bytes, address: str = "127.0.0.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that brought some bytes, and waits."""
    host, port = world.process.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
    writer.write(data)
    with suppress(ConnectionError):
        await writer.drain()
    return reader, writer


async def _statuses(lines: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> set[bytes]:
    """What those were answered that were; the others are cut off."""
    found = set()
    for reader, writer in lines:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.01):
                found.add((await reader.readline())[:12])
        writer.transport.abort()
    return found


@bomb
async def large_heads_of_many_connections(world: World) -> None:
    """Of 240 KiB each; it was 480 MiB."""
    head = b"GET /x HTTP/1.1\r\nHost: x\r\n" + (b"X-Y: " + b"y" * 4000 + b"\r\n") * 60
    lines = await asyncio.gather(*(_open(world, head) for _ in range(1000)))
    assert await _statuses(lines) <= {b"HTTP/1.1 431"}


@bomb
async def heads_of_many_connections_that_do_not_end(world: World) -> None:
    """As large as may be, with a whole one before it."""
    fields = (b"X-Y: " + b"y" * 1000 + b"\r\n") * 15
    head = b"GET /x HTTP/1.1\r\nHost: x\r\n" + fields
    lines = await asyncio.gather(*(_open(world, head + b"\r\n" + head) for _ in range(1000)))
    assert await _statuses(lines) <= {b"HTTP/1.1 404", b""}


@bomb
async def narinfos_of_many_connections_that_do_not_end(world: World) -> None:
    """Of almost 1 MiB each; it was 700 MiB. Who finds no room is told so, and ordinary ones are taken."""
    head = (
        f"PUT /{'3' * 32}.narinfo HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB}\r\n"
        f"Authorization: Bearer {world.token}\r\n\r\n"
    )
    body = head.encode() + bytes(MIB - 10)
    assert await world.put(f"{'3' * 32}.narinfo", b"x") == 422  # the token is known now
    lines = []
    for _ in range(40):
        lines += await asyncio.gather(*(_open(world, body) for _ in range(10)))
        assert (await world.get("healthz"))[0] == 200  # what one read brings is not counted
    assert b"HTTP/1.1 503" in await _statuses(lines)

    # what was cut off holds no room
    async def taken() -> bool:
        return await world.put(f"{'3' * 32}.narinfo", bytes(1000)) == 422

    await eventually(taken)


@bomb
async def bodies_that_arrive_in_the_same_instant(world: World) -> None:
    """Of 1,000 connections, each of which has as much as one read brings; it was 265 MiB.

    Others are answered meanwhile, and who found no room finds it again.
    """
    token = f"Host: x\r\nAuthorization: Bearer {world.token}\r\n"
    head = f"PUT /nar/{'3' * 52}.nar HTTP/1.1\r\n{token}Content-Length: {MIB}\r\n"
    assert await world.put(f"{'3' * 32}.narinfo", b"x") == 422  # the token is known now
    [worker] = world.process.workers()
    lines = [await _open(world, head.encode(), f"127.0.0.{2 + n % 3}") for n in range(1000)]
    os.kill(worker, signal.SIGSTOP)
    try:
        for _, writer in lines:
            writer.write(b"\r\n" + bytes(400_000))
        await asyncio.sleep(1)  # the kernel has what it takes
    finally:
        os.kill(worker, signal.SIGCONT)
    assert (await world.get("healthz"))[0] == 200
    await _statuses(lines)
    assert await world.put(f"{'3' * 32}.narinfo", bytes(200_000)) == 422


@bomb
async def bodies_that_nobody_reads(world: World) -> None:
    """Whole ones, of requests that are answered without; the connections would stay. It was 60 KiB each."""
    size = 60 << 10
    put = f"PUT /{'3' * 10} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
    get = put.replace("PUT", "GET")
    lines = []
    for n in range(3000):
        request = (put if n % 2 else get).encode() + bytes(size)
        lines.append(await _open(world, request, f"127.0.0.{2 + n % 3}"))
    assert await _statuses(lines) <= {b"HTTP/1.1 400", b"HTTP/1.1 404"}


@bomb
async def bodies_behind_an_upload(world: World) -> None:
    """Each connection has brought something that was read, and the next is wanted by nobody; 1,000 took 278 MiB."""
    token = f"Host: x\r\nAuthorization: Bearer {world.token}\r\n"
    name = encode(hashlib.sha256(ZEROS).digest())
    first = f"PUT /nar/{name}.nar HTTP/1.1\r\n{token}Content-Length: {MIB}\r\n\r\n"
    wrong = token.replace(world.token, "narseal_0123456789ab_" + "x" * 43)
    second = f"PUT /nar/{'3' * 52}.nar HTTP/1.1\r\n{wrong}Content-Length: {MIB}\r\n\r\n"
    [worker] = world.process.workers()
    brought = first.encode() + ZEROS  # of so much the kernel takes more at a time, too
    lines = []
    for n in range(700):
        reader, writer = await _open(world, brought, f"127.0.0.{2 + n % 3}")
        assert (await reader.readuntil(b"\r\n\r\n"))[9:12] == b"201"
        lines.append((reader, writer))
    os.kill(worker, signal.SIGSTOP)
    try:
        for _, writer in lines:
            writer.write(second.encode() + bytes(400_000))
        await asyncio.sleep(1)  # the kernel has what it takes
    finally:
        os.kill(worker, signal.SIGCONT)
    assert (await world.get("healthz"))[0] == 200
    await _statuses(lines)


@bomb
async def small_chunks_with_a_wrong_token(world: World) -> None:
    """Of 24 KiB each, while their handlers wait, and then the clients leave; it was 340 MiB."""
    wrong = "Authorization: Bearer narseal_0123456789ab_" + "x" * 43
    head = f"PUT /nar/{'3' * 52}.nar HTTP/1.1\r\nHost: x\r\n{wrong}\r\n"
    body = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 4096
    lines = [await _open(world, body, f"127.0.0.{2 + n % 3}") for n in range(1000)]
    for _, writer in lines:
        writer.transport.abort()
    assert await world.put(f"{'3' * 32}.narinfo", bytes(200_000)) == 422


@bomb
async def uploads_that_are_interrupted(world: World) -> None:
    """A thousand, 32 at a time; what was read of each stayed for long: 230 MiB."""
    token = f"Host: x\r\nAuthorization: Bearer {world.token}\r\n"
    head = f"PUT /nar/{'3' * 52}.nar HTTP/1.1\r\n{token}Content-Length: {50 * MIB}\r\n\r\n"

    async def interrupted() -> None:
        _, writer = await _open(world, head.encode() + bytes(2 * MIB))
        await asyncio.sleep(0.05)
        writer.transport.abort()

    for _ in range(32):
        await asyncio.gather(*(interrupted() for _ in range(32)))
    log = world.process.log.read_text()
    assert "Connection lost" not in log


@bomb
async def narinfos_of_an_upstream_that_do_not_end(world: World) -> None:
    held = asyncio.Event()

    async def fault(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(bytes(MIB - 10))
        await held.wait()
        return response

    names = [f"{encode(n.to_bytes(20, 'big'))}.narinfo" for n in range(64)]
    for name in names:
        world.upstream.fault(name, fault)
    asking = [asyncio.ensure_future(world.get(name)) for name in names]
    done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result()[0] for task in done} == {503}
    held.set()
    assert {status for status, _ in await asyncio.gather(*asking)} <= {404, 503}


async def _text(world: World, name: str) -> str:
    async with world.session.get(f"{world.process.url}/{name}") as response:
        return await response.text()


async def _slow_reader(
    world: World, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """One who has the head of an answer, and takes no more."""
    host, port = world.process.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    return reader, writer


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def held(name: str, seen: Watched) -> None:
    print(f"{name}: +{seen.growth / MIB:.0f} MiB, the loop took {seen.stall * 1000:.0f} ms of CPU"
          f" between two answers, an answer {seen.wait * 1000:.0f} ms")  # fmt: skip
    assert seen.growth <= GROWTH, seen
    assert seen.stall <= STALL, seen


@pytest.mark.parametrize("name", BOMBS)
async def test_bomb(name: str, world: World) -> None:
    assert (await world.get(f"{ITEM.hash}.narinfo"))[0] == 200  # everything is imported
    [pid] = world.process.workers()
    with watching(pid, world.process.url) as seen:
        await BOMBS[name](world)
    held(name, seen)
    assert world.process.workers() == [pid]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("a_log_in_chunks_of_one_byte", 0.06),
        ("an_uploaded_log_in_chunks_of_one_byte", 0.06),
        ("large_heads_of_many_connections", 0.08),
        ("bodies_that_arrive_in_the_same_instant", 0.1),
    ],
)
async def test_the_loop_is_kept_for_less_than_a_tenth_of_a_second(
    name: str, most: float, world: World
) -> None:
    """It was 0.12 to 0.22 s. A prober that is held up itself sees more of the loop's time: so, in one try of some."""
    [pid] = world.process.workers()
    stalls: list[float] = []
    while not stalls or min(stalls) > most:
        assert len(stalls) < 10, stalls
        with watching(pid, world.process.url) as seen:
            with suppress(OSError):
                (world.process.folder / "storage" / log(201)).unlink()
            for file in world.process.folder.glob("storage/.narseal/unverified/*"):
                file.unlink()
            await BOMBS[name](world)
        stalls.append(seen.stall)


async def test_memory_that_was_freed_goes_back(world: World) -> None:
    """Four bundles of 7 MiB had left up to 150 MiB with the C library."""
    assert (await world.get(f"{ITEM.hash}.narinfo"))[0] == 200  # everything is imported
    [pid] = world.process.workers()
    base = resident(pid)
    await BOMBS["uploaded_attestations_of_one_large_text"](world)
    assert resident(pid) - base <= 64 * MIB


async def test_attestations_go_out_one_by_one(world: World) -> None:
    """Twelve of 4 MiB, and twelve readers who take nothing."""
    name = f"attestations/{digest_of(OTHER)}"
    bundles = [attested(OTHER, note=f"{n}" + "x" * (3 * MIB)) for n in range(12)]
    for bundle in bundles:
        assert await world.put(name, bundle) == 201
    [pid] = world.process.workers()
    with watching(pid, world.process.url) as seen:
        readers = [await _slow_reader(world, name) for _ in range(12)]
        lines = await _text(world, name)
    held("attestations", seen)
    found = sorted(json.loads(line)["dsseEnvelope"]["payload"] for line in lines.splitlines())
    wanted = sorted(json.loads(bundle)["dsseEnvelope"]["payload"] for bundle in bundles)
    assert found == wanted
    for _, writer in readers:
        await _close(writer)


async def test_names_without_end_are_bounded_on_disk(tmp_path: Path, upstream: FakeCache) -> None:
    for number in range(400):
        upstream.files[log(number)] = b"%d" % number
    with narseal_process(
        tmp_path, {"url": upstream.url}, limits={"side_files": "1M"}, workers=2
    ) as process:
        async with aiohttp.ClientSession() as session:
            world = World(process, upstream, session, "")
            before = world.on_disk()
            for number in range(400):
                assert (await world.get(log(number)))[0] == 200
            assert world.on_disk() - before <= MIB
            asked = upstream.asked.total()
            assert (await world.get(log(399)))[0] == 200  # the newest is kept
            assert upstream.asked.total() == asked


async def test_with_no_room_for_them_side_files_are_passed_on(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.files[log(1)] = b"built\n" * 100_000
    with narseal_process(tmp_path, {"url": upstream.url}, limits={"side_files": 0}) as process:
        async with aiohttp.ClientSession() as session:
            world = World(process, upstream, session, "")
            for _ in range(2):
                assert await world.get(log(1)) == (200, 600_000)
            assert upstream.asked[log(1)] == 2
            storage = process.folder / "storage"
            assert not list((storage / ".narseal").glob("*/log*"))
            # what was passed on goes with its last reader, a moment after the answer
            await asyncio.to_thread(until, lambda: not [*(storage / ".narseal/incoming").iterdir()])


async def test_uploaded_logs_are_counted_as_they_lie_on_disk(tmp_path: Path) -> None:
    """23 KiB on the wire were 756 MiB in storage. Two workers, who know nothing of each other."""
    token = add(tmp_path)
    tokens = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    upload = tokens | {"quarantine_size": "2M", "side_files": "8M"}
    with narseal_process(tmp_path, upload=upload, workers=2) as process:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True)
        ) as session:
            world = World(process, FakeCache(), session, token)
            before = world.on_disk()
            large = zeros(zstd.ZstdCompressor(), 3 * MIB)
            assert await world.put(log(0), large, "zstd") == 507  # more than may be on its way
            await asyncio.to_thread(until, lambda: world.on_disk() == before)
            body = zeros(zstd.ZstdCompressor(), MIB)
            answers = [await world.put(log(n), body, "zstd") for n in range(1, 20)]
            assert set(answers) == {201, 507}
            assert 4 <= answers.count(201) <= 8
            assert world.on_disk() - before <= 8 * MIB + (64 << 10)
            # what is there already takes no room
            again = [await world.put(log(n), body, "zstd") for n in range(1, 20)]
            assert all(a == 201 for a, b in zip(again, answers, strict=True) if b == 201)
            # what is taken away makes room again, as soon as somebody looks
            for file in (process.folder / "storage/log").iterdir():
                file.unlink()

            async def is_taken() -> bool:
                return await world.put(log(50), body, "zstd") == 201

            await eventually(is_taken)
            assert await world.get(log(50)) == (200, MIB)


@pytest.mark.parametrize("quarantine_size", ["8M"])
async def test_uploads_that_arrive_together_stay_within_the_quarantine(world: World) -> None:
    """Whether they say how large they are or not; and who only announces much holds no room."""

    async def nar(number: int, *, sized: bool) -> int:
        body = bytes([number]) * MIB
        name = f"nar/{Hash.sha256(body).nix32}.nar"

        async def slowly() -> AsyncIterator[bytes]:
            for at in range(0, MIB, 1 << 16):
                yield body[at : at + (1 << 16)]
                most.append(world.on_disk())
                await asyncio.sleep(0.01)

        if not sized:
            return await world.put(name, slowly())
        headers = {"Authorization": f"Bearer {world.token}", "Content-Length": str(MIB)}
        async with world.session.put(
            f"{world.process.url}/{name}", data=slowly(), headers=headers
        ) as response:
            return response.status

    most: list[int] = []
    before = world.on_disk()
    answers = await asyncio.gather(*(nar(n, sized=bool(n % 2)) for n in range(24)))
    assert set(answers) <= {201, 507} and 507 in answers
    assert max(most) - before <= 8 * MIB + (1 << 16)
    assert answers.count(201) <= 8
    # what was not taken holds no room: the next one that is alone is taken, if it fits
    assert await nar(100, sized=True) == (201 if answers.count(201) < 8 else 507)


async def test_bodies_that_nobody_wants_are_bounded_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes is decrypted, whoever it is from: 400 connections with a wrong token took 270 MiB."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    tls, context = self_signed(tmp_path)
    wrong = f"Host: x\r\nAuthorization: Bearer narseal_0123456789ab_{'x' * 43}\r\n"
    head = f"PUT /nar/{'3' * 52}.nar HTTP/1.1\r\n{wrong}Content-Length: {50 * MIB}\r\n\r\n"
    with narseal_process(tmp_path / "n", upload=upload, tls=tls) as process:
        [pid] = process.workers()
        host, port = process.url.removeprefix("https://").split(":")
        base, grown, writers = resident(pid), 0, []
        for _ in range(400):
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            writer.write(head.encode() + bytes(600 << 10))
            writers.append(writer)
            grown = max(grown, resident(pid) - base)
        for _ in range(30):
            await asyncio.sleep(0.1)
            grown = max(grown, resident(pid) - base)
        for writer in writers:
            writer.transport.abort()
    assert 0 < grown <= GROWTH, grown


def test_the_table_has_enough_rows() -> None:
    assert len(BOMBS) >= 24
