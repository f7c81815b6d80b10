"""What comes from outside and is none of ours to trust: heads of requests, redirects, issuers."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from narseal.errors import UpstreamTrouble
from narseal.server import worker
from narseal.upstream.addresses import check_public, public_addresses
from narseal.upstream.redirects import next_hop
from tests.faults.test_oidc import good, uploading
from tests.faults.test_uploads import ITEM as UPLOADED
from tests.faults.test_uploads import uploading as uploading_by_token
from tests.tools.cache import entry
from tests.tools.narseal import UPSTREAM, Client, narseal
from tests.tools.sigstore.issuer import Issuer
from tests.tools.upstream import FakeCache, status
from tests.tools.waiting import PATIENCE

ITEM = entry("app-1", b"x" * 100_000).signed(UPSTREAM)


async def ask(client: Client, request: bytes, *, body: bytes = b"") -> tuple[bytes, int]:
    """All that is answered to raw bytes, and how much of a body the server took."""
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    sent = 0
    try:
        for at in range(0, len(body), 1 << 16):
            writer.write(body[at : at + (1 << 16)])
            async with asyncio.timeout(30):
                await writer.drain()
            sent = at
    except OSError:
        pass
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer, sent


#: Names of Authorization fields that are no token, and bytes that are no text.
FIELDS = [
    b"Bearer \xff", b"Bearer \xed\xa0\x80", b"Bearer \xc3\xa9", b"Basic \xff", b"Basic /w==",
    b"Basic " + base64.b64encode(b"x:\xff"), b"Basic " + base64.b64encode("x:é".encode()),
    b"\xff\xfe", b"Bearer a.b.\xff", b"Basic ====", b"Bearer " + b"\xf0\x9f" * 500,
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
async def test_an_authorization_that_is_no_text_is_401(field: bytes, tmp_path: Path) -> None:
    async with uploading_by_token(tmp_path) as uploader:
        head = b"PUT /nix-cache-info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        answer, _ = await ask(
            uploader.client, head + b"Content-Length: 0\r\nAuthorization: " + field + b"\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 401 "), answer


@pytest.mark.parametrize("name", ["Content-Encoding", "If-None-Match", "Range", "X-Request-Id"])
async def test_other_fields_that_are_no_text_are_no_fault(name: str, tmp_path: Path) -> None:
    async with uploading_by_token(tmp_path) as uploader:
        for method in (b"GET", b"PUT"):
            head = method + b" /" + UPLOADED.hash.encode() + b".narinfo HTTP/1.1\r\nHost: x\r\n"
            more = f"Authorization: {uploader.headers['Authorization']}\r\nContent-Length: 1\r\n"
            answer, _ = await ask(
                uploader.client,
                head
                + more.encode()
                + b"Connection: close\r\n"
                + name.encode()
                + b": \xff\xfe\r\n\r\nx",
            )
            assert answer.split()[1] in (b"400", b"404", b"422"), answer


@pytest.mark.parametrize(
    "target", [b"/nar/x.nar", b"/x", b"/", b"/attestations/x", b"/nar/" + b"0" * 52 + b".nar.sig"]
)
async def test_a_body_that_no_route_wants_is_not_asked_for(target: bytes, tmp_path: Path) -> None:
    async with uploading_by_token(tmp_path) as uploader:
        for method in (b"PUT", b"POST", b"GET"):
            head = method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n"
            answer, _ = await ask(uploader.client, head + b"Expect: 100-continue\r\n\r\n")
            assert b"100 Continue" not in answer
            expected = (b"400",) if method == b"GET" else (b"404", b"405")
            assert answer.split()[1] in expected, answer
            assert b"Connection: close" in answer
    assert not list((tmp_path / "storage/.narseal/incoming").iterdir())


async def test_an_answer_arrives_though_its_body_is_not_read(tmp_path: Path) -> None:
    """More than the socket takes: a connection that is closed at once would lose the answer."""
    async with uploading_by_token(tmp_path) as uploader:
        for target, status in ((b"/nar/x.nar", b"404"), (b"/attestations/x", b"404")):
            for size in (100, 8 << 10, 100_000, 20 << 20):
                head = b"PUT " + target + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                answer, _ = await ask(uploader.client, head % size + bytes(size))
                assert answer.split()[1] == status, (size, answer)


async def test_chunks_that_nobody_wants_end_with_their_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is not kept for what does not come, which may take for ever here."""
    monkeypatch.setattr(worker, "_LINGER", 10 * PATIENCE)
    async with uploading_by_token(tmp_path) as uploader:
        head = b"PUT /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer, _ = await ask(uploader.client, head + b"5\r\nhello\r\n0\r\n\r\n")
        assert answer.split()[1] == b"404"


@pytest.mark.parametrize("pause", [0, 0.2])
@pytest.mark.parametrize("target", [UPLOADED.info.url, f"{UPLOADED.hash}.narinfo"])
async def test_chunks_that_are_none_are_refused_at_once(
    target: str, pause: float, tmp_path: Path
) -> None:
    """With the head, or while the handler waits for them."""
    async with uploading_by_token(tmp_path) as uploader:
        host, port = uploader.client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"PUT /{target} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        head += f"Authorization: {uploader.headers['Authorization']}\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(pause)
        writer.write(b"zz\r\n")
        async with asyncio.timeout(PATIENCE):
            answer = await reader.read()
        writer.close()
        assert answer.split()[1] == b"422", answer
        assert b"the body's chunks" in answer


async def test_methods_that_a_route_lacks_are_named(tmp_path: Path) -> None:
    async with narseal(tmp_path) as client:
        async with client.session.post(f"{client.url}/pubkey") as response:
            assert response.status == 405
            assert set(response.headers["Allow"].split(",")) == {"GET", "HEAD"}
        async with client.session.get(f"{client.url}/there/is/nothing%0a") as response:
            assert response.status == 404


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "ff0e::1", "100::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",  # IPv4-mapped
    "::127.0.0.1", "::10.0.0.1",  # IPv4-compatible
    "::ffff:0:10.0.0.1",  # translated
    "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::10.0.0.1",  # NAT64
    "2002:7f00:1::", "2002:a00:1::1", "2002:a9fe:a9fe::1", "2002:c0a8:101::",  # 6to4
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001::f5ff:fffe",  # Teredo
    "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:192.168.0.1",  # ISATAP
]  # fmt: skip
PUBLIC = [
    "8.8.8.8", "151.101.1.91", "2606:4700::1", "2a04:4e42::347", "64:ff9b::8.8.8.8",
    "2002:808:808::1",
]  # fmt: skip


def test_addresses_that_a_redirect_may_lead_to() -> None:
    for address in PRIVATE:
        with pytest.raises(OSError, match="not public"):
            check_public(address)
    for address in PUBLIC:
        check_public(address)
    with pytest.raises(OSError, match="not public"):
        list(public_addresses("localhost", 80))


@contextmanager
def canary() -> Iterator[tuple[int, list[object]]]:
    """A port on every loopback address, and the connections that came."""
    came: list[object] = []
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        server.settimeout(0.1)
        ended = threading.Event()

        def accept() -> None:
            while not ended.is_set():
                try:
                    connection, peer = server.accept()
                except TimeoutError:
                    continue
                came.append(peer)
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1], came
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]", "127.1"]
)
async def test_no_connection_is_made_to_where_a_redirect_must_not_lead(
    host: str, tmp_path: Path, upstream: FakeCache
) -> None:
    """Neither for a narinfo, nor for a log, nor for a NAR; not even one that is closed again."""
    other = entry("app-2", b"x" * 100).signed(UPSTREAM)
    upstream.add(other)
    with canary() as (port, came):
        log = f"log/{'0' * 32}-x.drv"
        for name in (f"{ITEM.hash}.narinfo", log, other.info.url):
            upstream.fault(name, status(302, Location=f"http://{host}:{port}/x"), times=50)
        async with narseal(tmp_path, {"url": upstream.url}) as client:
            assert (await client.get(f"{ITEM.hash}.narinfo"))[0] == 502
            assert (await client.get(log))[0] == 502
            info = await client.narinfo(other.hash)
            assert (await client.get(info.url))[0] == 502
        assert came == []


class HangingIssuer(Issuer):
    """Answers nobody until it is let go; counts who asks."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.asked = 0
        super().__init__()

    def _discovery(self, issuer: str) -> dict[str, Any]:
        self.asked += 1
        self.free.wait(300)
        return super()._discovery(issuer)

    def close(self) -> None:
        self.free.set()
        super().close()


@pytest.fixture
def hanging() -> Iterator[HangingIssuer]:
    issuer = HangingIssuer()
    yield issuer
    issuer.close()


def forged(issuer: Issuer, number: int) -> str:
    """A token that anybody can make: it names the issuer, and is signed by nobody."""
    parts = good(issuer).split(".")
    header = {"alg": "RS256", "typ": "JWT", "kid": f"forged-{number}"}
    parts[0] = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    return ".".join([*parts[:2], "AAAA"])


async def test_while_an_issuer_hangs_stored_nars_do_not_wait(
    tmp_path: Path, hanging: HangingIssuer
) -> None:
    """More forged tokens than the worker has threads: what is stored is answered all the while."""
    async with uploading(tmp_path, hanging) as bearing:
        uploader = bearing(good(hanging))
        assert (await uploader.path(UPLOADED))[0] == 201
        before = hanging.asked
        hanging.free.clear()
        storm = [
            asyncio.create_task(bearing(forged(hanging, n)).put("nix-cache-info", b""))
            for n in range(80)
        ]
        client = uploader.client
        # the issuer was asked a moment ago, so an unknown key may be known to be none
        for _ in range(20):
            status_, body, _ = await client.get(UPLOADED.info.url, headers={"Range": "bytes=0-9"})
            assert (status_, body) == (206, UPLOADED.file[:10])
        answers = {status_ for status_, _ in await asyncio.gather(*storm)}
        assert answers <= {401, 502}
        assert hanging.asked - before <= 2
        # whose key is known is not affected
        assert (await bearing(good(hanging, jti="2")).put("nix-cache-info", b""))[0] == 200


async def test_an_issuer_that_hangs_is_asked_once_and_its_failure_is_remembered(
    tmp_path: Path, hanging: HangingIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narseal.server import oidc

    monkeypatch.setattr(oidc, "_TIMEOUT", 0.5)
    monkeypatch.setattr(oidc, "_AGAIN_SECONDS", 3600.0)
    hanging.free.clear()
    async with uploading(tmp_path, hanging) as bearing:
        first = await asyncio.gather(
            *(bearing(forged(hanging, n)).put("nix-cache-info", b"") for n in range(40))
        )
        assert {status_ for status_, _ in first} == {502}
        again = await bearing(good(hanging)).put("nix-cache-info", b"")
        assert (again[0], "no answer in time" in again[1]) == (502, True)
        assert hanging.asked == 1
        hanging.free.set()
        monkeypatch.setattr(oidc, "_AGAIN_SECONDS", 0.0)
        assert (await bearing(good(hanging)).put("nix-cache-info", b""))[0] == 200


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("https://a.example/x", "http://a.example/x"),
        ("https://a.example/x", "file:///etc/passwd"),
        ("https://a.example/x", "ftp://a.example/x"),
        ("http://a.example/x", "gopher://a.example/"),
        ("http://a.example/x", ""),
    ],
)
def test_redirects_that_are_not_followed(place: str, target: str) -> None:
    with pytest.raises(UpstreamTrouble, match="redirects"):
        next_hop(URL(place), target)


@pytest.mark.parametrize(
    ("place", "target", "there"),
    [
        ("https://a.example/x", "https://b.example/y", "https://b.example/y"),
        ("https://a.example/x", "/y", "https://a.example/y"),
        ("https://a.example/x", "//b.example/y", "https://b.example/y"),
        ("http://a.example/x", "https://a.example/x", "https://a.example/x"),
    ],
)
def test_redirects_that_are_followed(place: str, target: str, there: str) -> None:
    assert next_hop(URL(place), target) == URL(there)
