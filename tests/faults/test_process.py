"""The real command: workers, signals, crashes, full disks, sockets, broken configurations."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.client
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from narseal.nix.narinfo import NarInfo
from tests.tools.cache import Entry, entry, write_cache
from tests.tools.command import narseal_command
from tests.tools.narseal import (
    UPSTREAM,
    Process,
    is_countersigned,
    narseal_process,
    render_toml,
    settings,
)
from tests.tools.ports import free_ports
from tests.tools.tls import self_signed
from tests.tools.waiting import PATIENCE, until

ITEMS = [entry(f"item{n}", os.urandom(40_000)).signed(UPSTREAM) for n in range(12)]
BIG = entry("big", os.urandom(24 << 20), compression="none").signed(UPSTREAM)


def fetch(url: str, **headers: str) -> tuple[int, bytes]:
    """Status and body; a broken body raises http.client.IncompleteRead."""
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def cache_of(folder: Path, *items: Entry) -> dict[str, str]:
    write_cache(folder / "cache", *items)
    return {"url": f"file://{folder}/cache"}


def check_storage(storage: Path, items: list[Entry]) -> None:
    """What the checker after every crash wants: all or nothing, and nothing that is wrong."""
    by_hash = {item.hash: item for item in items}
    for file in storage.glob("nar/*"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest in {hashlib.sha256(item.file).hexdigest() for item in items}, file
    for file in storage.glob("*.narinfo"):
        info = NarInfo.parse(file.read_bytes())
        assert is_countersigned(info), file
        assert info.nar_hash == by_hash[info.store_path.hash_part].info.nar_hash
        assert (storage / info.url).exists(), f"{file} without its NAR"


def test_metrics_are_right_across_workers(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=3) as proxy:
        for _ in range(10):
            for item in ITEMS:  # each on a connection of its own, so on any worker
                assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        wanted = 10 * len(ITEMS)
        text = ""
        lines: dict[str, str] = {}

        def all_counted() -> bool:
            nonlocal text, lines
            text = fetch(f"{proxy.url}/metrics")[1].decode()
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
            count = float(lines['narseal_requests_total{code="200",route="narinfo"}'])
            assert count <= wanted
            return count == wanted

        until(all_counted)
        assert float(lines['narseal_request_seconds_count{route="narinfo"}']) == wanted
        assert 'sigstore_verify_ms_bucket{kind="nix",le="500.0"}' in lines
        assert len([line for line in lines if str(tmp_path) in line]) == 0
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
        )
        # the one name that is not ours: Sigstore's dashboards have it so
        complaints = checked.stderr.splitlines()
        assert complaints == [
            "sigstore_verify_ms metric names should not contain abbreviated units"
        ]


def test_the_example_rules_are_rules() -> None:
    rules = Path(__file__).parent.parent.parent / "examples/prometheus-rules.yml"
    checked = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_dead_worker_is_restarted_and_nobody_is_turned_away(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS), workers=2) as proxy:
        before = proxy.workers()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        for _ in range(40):
            assert fetch(f"{proxy.url}/{ITEMS[0].hash}.narinfo")[0] == 200
        after = proxy.workers()
        assert len(after) == 2 and before[0] not in after
        assert "a worker died and is restarted" in proxy.log.read_text()


def test_no_worker_serves_what_another_has_refused(tmp_path: Path) -> None:
    wrong = entry("wrong", b"right", compression="none").signed(UPSTREAM)
    upstream = cache_of(tmp_path, wrong)
    (tmp_path / "cache" / wrong.info.url).write_bytes(wrong.file.replace(b"right", b"wrong"))
    with narseal_process(tmp_path, upstream, workers=4) as proxy:
        target = f"{proxy.url}/{wrong.hash}.narinfo"
        for _ in range(60):  # until it is in the memory of all of them
            assert fetch(target)[0] == 200
        assert fetch(f"{proxy.url}/{wrong.info.url}")[0] == 404
        assert {fetch(target)[0] for _ in range(60)} == {404}
        refusals = [
            line
            for line in map(json.loads, proxy.log.read_text().splitlines())
            if line.get("reason") == "content-mismatch"
        ]
        assert len(refusals) == 1
        assert {"time", "level", "upstream", "object", "request"} <= refusals[0].keys() | {
            "request"
        }


@pytest.mark.parametrize("moment", range(12))
def test_kill_9_leaves_all_or_nothing(moment: int, tmp_path: Path) -> None:
    items = [*ITEMS, BIG]
    upstream = cache_of(tmp_path, *items)
    with narseal_process(tmp_path, upstream) as proxy:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            wanted = [pool.submit(_try_path, proxy.url, item) for item in items]
            time.sleep(0.01 + moment * 0.02)
            for pid in [proxy.process.pid, *proxy.workers()]:
                os.kill(pid, signal.SIGKILL)
            concurrent.futures.wait(wanted)
    check_storage(tmp_path / "storage", items)
    with narseal_process(tmp_path, upstream) as proxy:
        for item in items:
            status, text = fetch(f"{proxy.url}/{item.hash}.narinfo")
            assert status == 200
            assert fetch(f"{proxy.url}/{NarInfo.parse(text).url}") == (200, item.file)
        until(lambda: not any((tmp_path / "storage/.narseal/incoming").iterdir()))
    check_storage(tmp_path / "storage", items)


def _try_path(url: str, item: Entry) -> bool:
    """Whether a path could be had; what comes must be right."""
    try:
        status, text = fetch(f"{url}/{item.hash}.narinfo")
        if status == 200:
            assert fetch(f"{url}/{NarInfo.parse(text).url}") == (200, item.file)
        return status == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def strace(proxy: Process, *options: str, worker: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A worker under strace, which shows its system calls or makes them fail or kill."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(proxy.workers()[worker]), *options], stderr=subprocess.PIPE
    )
    assert tracer.stderr is not None
    tracer.stderr.readline()  # "Process … attached"
    try:
        yield tracer
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


def test_files_are_synced_then_renamed_then_recorded(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, ITEMS[0])
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2"
    with (
        narseal_process(tmp_path, upstream) as proxy,
        strace(proxy, "-y", "-e", calls, "-o", str(trace)),
    ):
        assert fetch(f"{proxy.url}/{ITEMS[0].hash}.narinfo")[0] == 200
        assert fetch(f"{proxy.url}/{ITEMS[0].info.url}") == (200, ITEMS[0].file)
        until((tmp_path / "storage" / f"{ITEMS[0].hash}.narinfo").exists)
    lines = trace.read_text().splitlines()
    name = ITEMS[0].info.url
    renamed = next(n for n, line in enumerate(lines) if "rename" in line and name in line)
    incoming = lines[renamed].split('"')[1]
    synced = next(n for n, line in enumerate(lines) if "fsync" in line and incoming in line)
    folder = next(
        n for n, line in enumerate(lines) if n > renamed and "fsync" in line and "nar>" in line
    )
    recorded = next(
        n for n, line in enumerate(lines) if n > folder and "sync" in line and "index" in line
    )
    narinfo = next(
        n for n, line in enumerate(lines) if "rename" in line and f"{ITEMS[0].hash}.narinfo" in line
    )
    assert synced < renamed < folder < recorded < narinfo


@pytest.mark.parametrize("call", ["rename", "fsync", "pwrite64"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_in_the_middle_of_a_system_call(call: str, number: int, tmp_path: Path) -> None:
    """The worker dies in its nth call; the next one serves, and storage is right."""
    items = ITEMS
    upstream = cache_of(tmp_path, *items)
    inject = f"inject={call}:signal=KILL:when={number}"
    with narseal_process(tmp_path, upstream) as proxy:
        with strace(proxy, "-e", f"trace={call}", "-e", inject, "-o", "/dev/null") as tracer:
            for item in items:
                _try_path(proxy.url, item)
            tracer.wait(PATIENCE)
        for item in items:
            until(partial(_try_path, proxy.url, item))
        until(lambda: not any((tmp_path / "storage/.narseal/incoming").iterdir()))
        check_storage(tmp_path / "storage", items)
        assert "a worker died" in proxy.log.read_text()


def test_fsync_that_fails_publishes_nothing(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, BIG)
    with narseal_process(tmp_path, upstream) as proxy:
        assert fetch(f"{proxy.url}/{BIG.hash}.narinfo")[0] == 200
        eio = "inject=fsync:error=EIO:when=1"
        with strace(proxy, "-e", "trace=fsync", "-e", eio, "-o", "/dev/null"):
            # the content is right, so the reader gets it; it is not kept
            assert fetch(f"{proxy.url}/{BIG.info.url}") == (200, BIG.file)
            until(lambda: "storage fails" in proxy.log.read_text())
            assert not (tmp_path / "storage" / BIG.info.url).exists()
        assert fetch(f"{proxy.url}/{BIG.info.url}") == (200, BIG.file)


def test_a_full_disk_is_507_and_recovers_unaided(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(storage)], check=True)
    try:
        with narseal_process(tmp_path, cache_of(tmp_path, BIG, *ITEMS)) as proxy:
            assert fetch(f"{proxy.url}/{BIG.hash}.narinfo")[0] == 200
            item = ITEMS[0]
            assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                status, _ = fetch(f"{proxy.url}/{BIG.info.url}")
                assert status == 507
                raise ConnectionError
            assert fetch(f"{proxy.url}/{item.info.url}") == (200, item.file)
            until(lambda: not any((storage / ".narseal/incoming").iterdir()))
            subprocess.run(["mount", "-o", "remount,size=64M", str(storage)], check=True)
            assert fetch(f"{proxy.url}/{BIG.info.url}") == (200, BIG.file)
    finally:
        subprocess.run(["umount", "-l", str(storage)], check=True)


def test_a_locked_index_is_503_for_new_paths_and_nothing_for_the_others(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        known, fresh = (f"{proxy.url}/{item.hash}.narinfo" for item in ITEMS[:2])
        assert fetch(known)[0] == 200
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as other:
            other.execute("BEGIN IMMEDIATE")
            with concurrent.futures.ThreadPoolExecutor() as pool:
                waiting = pool.submit(fetch, fresh)
                while not waiting.done():
                    assert fetch(known)[0] == 200
                assert waiting.result()[0] == 503
            other.rollback()
        assert fetch(fresh)[0] == 200


def test_out_of_descriptors_is_survived(tmp_path: Path) -> None:
    """A crowd that comes in one moment: each is answered or told that there is no room."""
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        target = f"/{ITEMS[0].hash}.narinfo"
        assert fetch(proxy.url + target)[0] == 200
        pid = proxy.workers()[0]
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 40, hard))
        host, port = proxy.url.removeprefix("http://").split(":")
        os.kill(pid, signal.SIGSTOP)
        crowd = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(200)]
        for connection in crowd:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        os.kill(pid, signal.SIGCONT)
        answers = {connection.recv(1 << 16)[:12] for connection in crowd}
        assert answers == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        for connection in crowd:
            connection.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        for item in ITEMS:
            until(partial(_try_path, proxy.url, item))
        assert proxy.workers() == [pid]


def test_out_of_descriptors_is_503(tmp_path: Path) -> None:
    """Whoever comes when there is no room is told so; nobody is cut off, and it goes on."""
    with narseal_process(tmp_path, cache_of(tmp_path, *ITEMS)) as proxy:
        target = f"/{ITEMS[0].hash}.narinfo"
        assert fetch(proxy.url + target)[0] == 200
        pid = proxy.workers()[0]
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 40, hard))
        host, port = proxy.url.removeprefix("http://").split(":")
        crowd: list[http.client.HTTPConnection] = []
        answers = []
        for _ in range(80):  # each of them stays
            connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
            connection.request("GET", target)
            response = connection.getresponse()
            answers.append((response.status, response.headers["Retry-After"]))
            response.read()
            crowd.append(connection)
        assert set(answers) == {(200, None), (503, "5")}
        # with no room for connections there is still some for files
        stays = crowd[0]
        stays.request("GET", f"/{ITEMS[1].hash}.narinfo")
        assert stays.getresponse().read()
        stays.request("GET", f"/{ITEMS[0].info.url}")
        assert stays.getresponse().read() == ITEMS[0].file
        for connection in crowd:
            connection.close()
        until(lambda: fetch(proxy.url + target)[0] == 200)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert proxy.workers() == [pid]


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port)).close()
    except OSError:
        return False
    return True


def test_sigterm_lets_a_running_download_end(tmp_path: Path) -> None:
    upstream = cache_of(tmp_path, BIG)
    with narseal_process(tmp_path, upstream, limits={"shutdown_timeout": "4m"}) as proxy:
        fetch(f"{proxy.url}/{BIG.hash}.narinfo")
        host, port = proxy.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        connection.connect((host, int(port)))
        connection.sendall(f"GET /{BIG.info.url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = connection.recv(4096)
        proxy.process.send_signal(signal.SIGTERM)
        until(lambda: not _listens(host, int(port)))
        assert proxy.process.poll() is None
        data = head
        while chunk := connection.recv(1 << 16):
            data += chunk
        connection.close()
        assert data.partition(b"\r\n\r\n")[2] == BIG.file
        assert proxy.process.wait(PATIENCE) == 0


def test_a_second_narseal_on_the_same_storage_is_refused(tmp_path: Path) -> None:
    with narseal_process(tmp_path, cache_of(tmp_path)) as proxy:
        file = proxy.folder / "narseal.toml"
        second = narseal_command("serve", "--config", str(file))
        assert second.returncode == 2
        assert "another narseal serves from it" in second.stderr


def test_unix_socket_tls_and_a_metrics_listener(tmp_path: Path) -> None:
    tls, context = self_signed(tmp_path)
    upstream = cache_of(tmp_path, BIG)
    [port] = free_ports(1)
    with narseal_process(
        tmp_path / "tls", upstream, tls=tls, metrics={"listen": f"127.0.0.1:{port}"}
    ) as proxy:
        assert proxy.url.startswith("https://")
        for name, wanted in ((f"{BIG.hash}.narinfo", None), (BIG.info.url, BIG.file)) * 2:
            with urllib.request.urlopen(f"{proxy.url}/{name}", context=context) as response:
                body = response.read()
                assert wanted is None or body == wanted
        assert b"narseal_build_info" in fetch(f"http://127.0.0.1:{port}/metrics")[1]
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{proxy.url}/metrics", context=context)
    with narseal_process(tmp_path / "unix", upstream, listen=f"unix:{tmp_path}/s", workers=2):
        for _ in range(5):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"{tmp_path}/s")
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.close()


_ACTIVATE = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "narseal", "serve", "--config", sys.argv[1]])
"""


def test_systemd_socket_activation_and_readiness(tmp_path: Path) -> None:
    file = tmp_path / "narseal.toml"
    upstream = cache_of(tmp_path, ITEMS[0])
    file.write_text(render_toml(settings(tmp_path, upstream, listen="systemd", workers=2)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(PATIENCE)
        process = subprocess.Popen(
            [sys.executable, "-c", _ACTIVATE, str(file)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )  # fmt: skip
        assert process.stdout is not None
        port = int(process.stdout.readline())
        # a request may come before narseal is up: it waits in systemd's socket
        assert fetch(f"http://127.0.0.1:{port}/{ITEMS[0].hash}.narinfo")[0] == 200
        assert notify.recv(64) == b"READY=1"
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()


KEY = str(UPSTREAM.public)
BROKEN: list[tuple[str, str]] = [
    ("lisen = 'x'", "line 1: lisen: there is no such setting"),
    ("listen = '8080'", 'listen: not "host:port"'),
    ("workers = 0", "workers"),
    ("workers = 'many'", "workers"),
    ("priority = -1", "priority"),
    ("store_dir = 'nix/store'", "store_dir"),
    ("store_dir = '/nix/store/'", "store_dir"),
    ("[[upstream]]\nurl = 'ftp://x'", "line 2: upstream[0].url"),
    ("[[upstream]]\nurl = 'https://u:p@x'", "credentials go into netrc_file"),
    ("[[upstream]]\nurl = 'https://x'", "public_keys is empty"),
    (f"[[upstream]]\nurl = 'https://x'\npublic_keys = ['{KEY}', '{KEY}']", "same name"),
    ("[[upstream]]\nurl = 'https://x'\npublic_keys = ['a:b']", "line 3"),
    ("[[upstream]]\nurl = 'https://x'\nverify = 'none'", "verify"),
    (f"[[upstream]]\nurl = 'file://x'\npublic_keys = ['{KEY}']", "absolute path"),
    ("[storage]\nurl = 's3://x'", "line 2: storage.url"),
    ("[storage]\nmax_size = '1G'", "there is no such setting"),
    ("[limits]\nnar_size = '5 apples'", "not a size"),
    ("[limits]\nheader_timeout = 'soon'", "not a duration"),
    ("[limits]\ncontent_hold = '1h'", "content_hold"),
    ("[[signing.key]]\nurl = 'vault:x'", "signing.key[0].url"),
    ("[[signing.key]]\nurl = 'file:/nowhere'", "/nowhere: cannot be read"),
    ("[[signing.key]]\nurl = 'file:/'", "not a regular file"),
    ("", "there is no [[signing.key]]"),
    ("listen = ", "not TOML"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_broken_configuration_says_what_to_change(number: int, tmp_path: Path) -> None:
    text, message = BROKEN[number]
    file = tmp_path / "narseal.toml"
    file.write_text(text)
    result = narseal_command("check-config", "--config", str(file))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_key_files_that_others_can_read_are_refused(tmp_path: Path) -> None:
    made = narseal_command("key", "generate", "cache.example.org-1", "-o", str(tmp_path / "k"))
    assert made.returncode == 0
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert narseal_command("key", "public", str(tmp_path / "k")).stdout == made.stdout
    again = narseal_command("key", "generate", "cache.example.org-1", "-o", str(tmp_path / "k"))
    assert again.returncode == 2 and "name another file" in again.stderr
    (tmp_path / "k").chmod(0o644)
    refused = narseal_command("key", "public", str(tmp_path / "k"))
    assert refused.returncode == 2
    assert "mode 0644 lets others read it; chmod 600" in refused.stderr
    assert narseal_command("key", "generate", "a b").returncode == 2


def test_environment_overrides_the_file_and_unknown_names_are_errors(tmp_path: Path) -> None:
    tree = settings(tmp_path, {"url": "https://example.org"})
    file = tmp_path / "narseal.toml"
    file.write_text(render_toml(tree))
    command = [sys.executable, "-m", "narseal", "check-config", "--config", str(file)]
    for variable, value, code in (
        ("NARSEAL_WORKERS", "4", 0), ("NARSEAL_LIMITS__NAR_SIZE", "5G", 0),
        ("NARSEAL_WORKERS", "x", 2), ("NARSEAL_WROKERS", "4", 2), ("NARSEAL_LIMITS__X", "4", 2),
    ):  # fmt: skip
        result = subprocess.run(
            command, env=os.environ | {variable: value}, capture_output=True, text=True
        )
        assert result.returncode == code, (variable, value, result.stderr)


def test_help_names_every_command() -> None:
    text = narseal_command("--help").stdout
    for command in ("serve", "check-config", "key"):
        assert command in text
