"""Watching a worker from outside: its memory, and whether its loop goes on."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Watched:
    """What was seen of a worker while it was watched."""

    answers: int = 0
    #: Seconds of CPU time that the loop's thread took between two answers to a prober, at most.
    stall: float = 0.0
    #: Seconds that an answer took, at most; on a busy machine that says little.
    wait: float = 0.0
    #: Bytes that the process grew by, at most.
    growth: int = 0


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def loop_seconds(pid: int) -> float:
    """CPU time of a process's main thread, where its loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def watching(pid: int, url: str) -> Iterator[Watched]:
    """Ask for /healthz again and again, and look at the process meanwhile."""
    seen = Watched()
    begun, ended = threading.Event(), threading.Event()
    base = resident(pid)

    def probe() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        before = None
        while not ended.is_set():
            start = time.monotonic()
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"ok\n")
            now = loop_seconds(pid)
            seen.wait = max(seen.wait, time.monotonic() - start)
            seen.stall = max(seen.stall, now - (now if before is None else before))
            before = now
            seen.answers += 1
            begun.set()
            time.sleep(0.002)
        connection.close()

    def weigh() -> None:
        while not ended.is_set():
            seen.growth = max(seen.growth, resident(pid) - base)
            time.sleep(0.005)

    threads = [threading.Thread(target=work) for work in (probe, weigh)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(120)
        yield seen
        after = seen.answers  # the prober is answered still
        deadline = time.monotonic() + 120
        while seen.answers < after + 2:
            assert time.monotonic() < deadline, "the worker answers nobody any more"
            time.sleep(0.005)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
