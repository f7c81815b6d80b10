"""What is counted in a worker's memory is in everybody's metrics, once, however the worker ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.faults.test_process import cache_of, fetch
from tests.tools.cache import entry
from tests.tools.changing import logged, write
from tests.tools.counting import PATHS
from tests.tools.narseal import UPSTREAM, Process, narseal_process
from tests.tools.waiting import PATIENCE, until

ITEMS = [entry(f"item{n}", os.urandom(4_000)).signed(UPSTREAM) for n in range(6)]
NARINFOS = 'narseal_requests_total{code="200",route="narinfo"}'
NARS = 'narseal_requests_total{code="200",route="nar"}'


def parsed(text: bytes) -> dict[str, float]:
    """Every sample by its name and labels."""
    lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if line[:1] != "#"]
    return {name: float(value) for name, value in lines}


class Line:
    """One connection, so one worker."""

    def __init__(self, proxy: Process) -> None:
        self._line = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=PATIENCE)

    def get(self, path: str) -> bytes:
        self._line.request("GET", f"/{path}")
        response = self._line.getresponse()
        assert response.status == 200
        return response.read()

    def scraped(self) -> dict[str, float]:
        return parsed(self.get("metrics"))


def scraped(proxy: Process) -> dict[str, float]:
    """By whichever worker."""
    status, text = fetch(f"{proxy.url}/metrics")
    assert status == 200
    return parsed(text)


def total(samples: dict[str, float], name: str) -> float:
    """Of all labels."""
    return sum(value for sample, value in samples.items() if re.split("[ {]", sample)[0] == name)


def test_a_worker_that_is_asked_itself_tells_all_that_it_counted(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=1) as proxy:
        line = Line(proxy)
        for round_ in range(1, 20):
            for item in ITEMS:
                line.get(f"{item.hash}.narinfo")
            samples = line.scraped()
            wanted = round_ * len(ITEMS)
            assert samples[NARINFOS] == wanted
            assert samples['narseal_request_seconds_count{route="narinfo"}'] == wanted
            assert samples['narseal_request_seconds_bucket{le="+Inf",route="narinfo"}'] == wanted
            assert samples["narseal_hot_hits_total"] == wanted - len(ITEMS)
            assert total(samples, "narseal_upstream_seconds_count") == len(ITEMS)
            assert samples['sigstore_verify_ms_count{kind="nix"}'] == len(ITEMS)
            assert samples['narseal_sign_seconds_count{kind="nix",result="good"}'] == len(ITEMS)


def test_each_worker_tells_what_the_other_counted(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=2) as proxy:
        line = Line(proxy)
        size = 0
        for item in ITEMS * 10:  # each on a connection of its own, so on either worker
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
            status, body = fetch(f"{proxy.url}/{item.info.url}")
            assert status == 200
            size += len(body)
        times = 10 * len(ITEMS)
        wanted = [times, times, times, size]

        def told(samples: dict[str, float]) -> list[float]:
            seconds = samples['narseal_request_seconds_count{route="nar"}']
            served = total(samples, "narseal_nar_bytes_total")
            return [samples[NARINFOS], samples[NARS], seconds, served]

        def all_told() -> bool:
            found = told(line.scraped())  # the other worker is never asked: it tells of itself
            assert all(have <= most for have, most in zip(found, wanted, strict=True)), found
            return found == wanted

        until(all_told)
        for _ in range(20):  # by whichever worker, and it stays so
            assert told(scraped(proxy)) == wanted


def test_nothing_that_a_worker_counted_is_lost_when_it_ends(tmp_path: Path) -> None:
    big = entry("big", os.urandom(16 << 20), compression="none").signed(UPSTREAM)
    cache = cache_of(tmp_path, big, *ITEMS)
    with narseal_process(tmp_path, cache, workers=1) as proxy:
        for generation in range(1, 4):
            for item in (big, *ITEMS):
                assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
            line = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=PATIENCE)
            line.request("GET", f"/{big.info.url}")
            response = line.getresponse()
            body = response.read(1 << 20)
            write(proxy, cache, workers=1, priority=30 + generation)
            proxy.process.send_signal(signal.SIGHUP)
            logged(proxy, "the changed configuration is in force", generation)
            body += response.read()  # the last that the worker does: it ends with it
            line.close()
            assert body == big.file
            until(lambda: len(proxy.workers()) == 1)
            samples = scraped(proxy)
            assert samples[NARINFOS] == generation * (1 + len(ITEMS))
            assert samples[NARS] == generation
            assert total(samples, "narseal_nar_bytes_total") == generation * len(big.file)
            assert samples['narseal_request_seconds_count{route="nar"}'] == generation


def test_counters_never_go_down_when_a_worker_is_killed(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=2) as proxy:
        before: dict[str, float] = {}

        def scrape() -> dict[str, float]:
            nonlocal before
            samples = scraped(proxy)
            gone = {
                name: (value, samples.get(name))
                for name, value in before.items()
                if re.search("_(total|count|sum|bucket)$", name.partition("{")[0])
                and samples.get(name, 0) < value
            }
            assert not gone
            before = samples
            return samples

        for deaths in range(1, 5):
            for item in ITEMS * 3:
                assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
                scrape()
            os.kill(proxy.workers()[deaths % 2], signal.SIGKILL)

            def restarted(deaths: int = deaths) -> bool:
                # counted by the parent, whose children count nothing of it again
                restarts = scrape()["narseal_worker_restarts_total"]
                assert restarts <= deaths
                return restarts == deaths and len(proxy.workers()) == 2

            until(restarted)
        assert scrape()[NARINFOS] <= 4 * 3 * len(ITEMS)


def test_a_cold_path_writes_no_file_and_asks_for_no_process_id_to_be_counted(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.counting", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout)
    assert PATHS > 10
    assert {"getpid", "write"}.isdisjoint(calls["cold"]), calls
    # it would have seen them: every series asks when it is made, and a gauge writes when it is set
    assert calls["in all"]["getpid"] > 0 and calls["in all"]["write, apart"] > 0, calls
