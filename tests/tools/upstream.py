"""A real HTTP binary cache that can be told to misbehave."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from narseal.server.conditional import parse_range
from tests.tools.cache import Entry

Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass
class FakeCache:
    """Files by address below the base URL; faults by address. Counts what it is asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    seen_headers: list[dict[str, str]] = field(default_factory=list)
    down: bool = False

    def add(self, *entries: Entry) -> None:
        for entry in entries:
            self.files |= entry.files()

    def fault(self, name: str, fault: Fault, times: int = 1) -> None:
        """Answer the next `times` requests for a file with the fault; None: as always."""
        self.faults.setdefault(name, []).extend([fault] * times)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.raw_path.lstrip("/")
        self.asked[name] += 1
        self.seen_headers.append(dict(request.headers))
        if self.down:
            return web.Response(status=503)
        if self.faults.get(name):
            response = await self.faults[name].pop(0)(request)
            if response is not None:
                return response
        data = self.files.get(name)
        if data is None:
            return web.Response(status=404, text="not here")
        headers = {"Accept-Ranges": "bytes"} | self.headers.get(name, {})
        span = parse_range(request.headers.get("Range"), len(data))
        if span is None:
            return web.Response(body=data, headers=headers)
        self.ranges.append(request.headers["Range"])
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(data)}"
        return web.Response(status=206, body=data[span.start : span.stop], headers=headers)

    def cut(self, name: str, at: int) -> Fault:
        """Break the line after so many bytes of the file."""

        async def fault(request: web.Request) -> web.StreamResponse:
            data = self.files[name]
            span = parse_range(request.headers.get("Range"), len(data))
            start = span.start if span else 0
            response = web.StreamResponse(status=206 if span else 200)
            if span:
                response.headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            response.content_length = len(data) - start
            await response.prepare(request)
            await response.write(data[start:at])
            assert request.transport is not None
            request.transport.close()
            return response

        return fault

    def stall(self, name: str, at: int, seconds: float) -> Fault:
        """Send so many bytes, then nothing for so long."""

        async def fault(request: web.Request) -> web.StreamResponse:
            data = self.files[name]
            response = web.StreamResponse()
            response.content_length = len(data)
            await response.prepare(request)
            await response.write(data[:at])
            await asyncio.sleep(seconds)
            return response

        return fault


class Gate:
    """A fault that holds a request back until it is opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()

    async def __call__(self, _: web.Request) -> None:
        self.reached.set()
        await self._open.wait()


def status(code: int, **headers: str) -> Fault:
    """Answer with a status."""

    async def fault(_: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers=headers)

    return fault


@asynccontextmanager
async def fake_cache() -> AsyncIterator[FakeCache]:
    """A running FakeCache on loopback."""
    cache = FakeCache()
    runner = web.ServerRunner(web.Server(cache.answer), shutdown_timeout=0.1)  # type: ignore[arg-type]
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    cache.url = f"http://{host}:{port}"
    try:
        yield cache
    finally:
        await runner.cleanup()
