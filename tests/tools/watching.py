"""Watching a worker from outside: its memory, and whether its loop goes on."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

#: The prober's own, so that it does not stand behind the connections of a test at 127.0.0.1.
_ADDRESS = "127.0.0.9"
_TIMEOUT = 120


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
    """Ask for /healthz again and again, and look at the process meanwhile.

    A process of its own does it: a test's is held up by what the test does.
    """
    seen = Watched()
    command = [sys.executable, __file__, str(pid), urlsplit(url).netloc]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as prober:
        assert prober.stdin is not None and prober.stdout is not None
        try:
            assert prober.stdout.readline() == b"begun\n"
            yield seen
            prober.stdin.close()
            answer = prober.stdout.read()
            assert answer, "the worker answers nobody any more"
            vars(seen).update(json.loads(answer))
        finally:
            prober.kill()


def _probe(pid: int, netloc: str) -> None:
    """Watch until nothing more comes in at stdin, and for two answers more."""
    seen = Watched()
    base = resident(pid)
    ended = threading.Event()

    def weigh() -> None:
        while not ended.is_set():
            seen.growth = max(seen.growth, resident(pid) - base)
            time.sleep(0.005)

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    connection = http.client.HTTPConnection(netloc, timeout=_TIMEOUT, source_address=(_ADDRESS, 0))

    def ask() -> float:
        start = time.monotonic()
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"ok\n")
        seen.wait = max(seen.wait, time.monotonic() - start)
        seen.answers += 1
        return loop_seconds(pid)

    before = ask()
    print("begun", flush=True)
    for work in (weigh, wait):
        threading.Thread(target=work, daemon=True).start()
    left = 2
    while left:
        left -= ended.is_set()
        now = ask()
        seen.stall = max(seen.stall, now - before)
        before = now
        time.sleep(0.002)
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    _probe(int(sys.argv[1]), sys.argv[2])
