"""Raw bytes to the sockets of a running narseal and of a running signer."""

from __future__ import annotations

import json
import random
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from narseal.custody import wire
from narseal.nix.narinfo import NarInfo
from tests.fuzz import seeds
from tests.fuzz.mutation import mutated
from tests.tools.cache import write_cache
from tests.tools.narseal import Process, narseal_process
from tests.tools.signer import Signer, signer
from tests.tools.waiting import PATIENCE

_ITEM = seeds.ITEM


def _request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode("latin-1") + body


#: What clients send, alone and one behind the other.
HTTP_SEEDS = (
    _request(f"GET /{_ITEM.hash}.narinfo HTTP/1.1"),
    _request(f"GET /{_ITEM.info.url} HTTP/1.1", "Range: bytes=0-9", 'If-Range: "x"'),
    _request(f"HEAD /{_ITEM.info.url} HTTP/1.1", "Accept-Encoding: gzip, br, zstd"),
    _request("GET /nix-cache-info HTTP/1.1", "Connection: close") * 2,
    _request(f"GET /status/{_ITEM.info.store_path} HTTP/1.1", "Accept: text/html"),
    _request(f"GET /attestations/sha256:{_ITEM.info.nar_hash.nix32} HTTP/1.1"),
    _request("PUT /nix-cache-info HTTP/1.1", "Authorization: Bearer narseal_x_y",
             "Content-Length: 3", "Expect: 100-continue", body=b"abc"),
    _request(f"PUT /{_ITEM.hash}.narinfo HTTP/1.1", "Authorization: Basic eDp5",
             "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
    _request("GET /realisations/sha256:%21out.doi HTTP/1.1", 'If-None-Match: W/"x", *'),
    _request("GET http://x/log/a.drv HTTP/1.1", "Upgrade: h2c"),
)  # fmt: skip
_LOG_OF_A_FAULT = re.compile(r"Traceback|\"level\": ?\"(ERROR|CRITICAL)\"", re.IGNORECASE)


class Http:
    """A narseal that serves one path, and what must hold for whatever it is sent."""

    def __init__(self, process: Process) -> None:
        self._process = process
        host, port = process.url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._workers = process.workers()
        self._read = 0

    def holds(self, data: bytes) -> bool:
        """Nothing of it is a fault of ours: no 500, no traceback, no dead worker."""
        answers = exchange(socket.AF_INET, self._address, data)
        logged = self._process.log.read_text()
        new, self._read = logged[self._read :], len(logged)
        fault = b"HTTP/1.1 500" in answers or _LOG_OF_A_FAULT.search(new)
        workers, self._workers = self._workers, self._process.workers()
        return not fault and workers == self._workers


class ToSigner:
    """A signer, and what must hold for whatever it is sent."""

    def __init__(self, found: Signer) -> None:
        self._signer = found
        self._read = 0

    def holds(self, data: bytes) -> bool:
        """It lives, says nothing of a fault, and signs nothing but the path it has evidence for."""
        answers = exchange(socket.AF_UNIX, str(self._signer.socket), data)
        logged = self._signer.errors.read_text()
        new, self._read = logged[self._read :], len(logged)
        running = self._signer.process is not None and self._signer.process.poll() is None
        return running and not _LOG_OF_A_FAULT.search(new) and _signed_well(data, answers)


def _signed_well(data: bytes, answers: bytes) -> bool:
    """Whether each signature is of a narinfo that was asked for, as the upstream signed it."""
    trees = (tree for body in wire.Frames().feed(answers) for tree in wire.decode_each(body))
    for tree in trees:
        assert isinstance(tree, dict)
        signature = str(tree.get("signature", ""))
        if not signature:
            continue
        good = _ITEM.info.fingerprint()
        names = (text for text in re.findall(rb'"narinfo":("(?:[^"\\]|\\.)*")', data))
        infos = [NarInfo.parse(json.loads(text).encode()) for text in names]
        if not any(info.fingerprint() == good for info in infos):
            return False
    return True


def exchange(family: int, address: tuple[str, int] | str, data: bytes) -> bytes:
    """Everything that comes back until the other side has nothing more to say."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            found = b""
            while portion := sock.recv(1 << 16):
                found += portion
        except ConnectionError:
            return b""
        return found


def fuzz_http(seconds: float) -> tuple[int, list[bytes]]:
    """How many inputs were tried, and those that broke a rule."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder / "cache", _ITEM)
        upload = {"enabled": True, "tokens_file": f"{folder}/tokens"}
        limits = {"header_timeout": "2s", "shutdown_timeout": "1s"}
        upstream = {"url": f"file://{folder}/cache"}
        with narseal_process(folder / "n", upstream, upload=upload, limits=limits) as process:
            return _fuzz(Http(process).holds, HTTP_SEEDS, seconds)


def fuzz_signer(seconds: float) -> tuple[int, list[bytes]]:
    """The same for the signer's socket."""
    with signer() as found:
        return _fuzz(ToSigner(found).holds, seeds.SIGNER, seconds)


def _fuzz(
    holds: Callable[[bytes], bool], good: tuple[bytes, ...], seconds: float
) -> tuple[int, list[bytes]]:
    choice = random.Random()
    findings: list[bytes] = []
    tried = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and len(findings) < 20:
        data = mutated(choice, good)
        tried += 1
        if not holds(data):
            findings.append(data)
    return tried, findings
