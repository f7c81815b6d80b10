"""The signer's bounds: what is asked of it is small and flat, and a rate is no refusal."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from narseal.custody import wire
from narseal.nix.keys import Signature
from tests.tools.cache import COMPRESS, Entry, entry, key
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal
from tests.tools.signer import Signer, signer
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE

pytestmark = pytest.mark.real

ITEM = entry("app-1", b"x", compression="zstd").signed(UPSTREAM)
#: What a narseal may hold in storage: every compression that has no file suffix, and one that has.
HASHED = [entry(f"mine-{name}", name.encode(), compression=name) for name in COMPRESS]


@pytest.fixture(scope="module")
def stored() -> Iterator[Path]:
    folder = Path(f"/tmp/narseal-hashed-{os.getpid()}")
    (folder / "nar").mkdir(parents=True)
    for item in HASHED:
        (folder / item.info.url).write_bytes(item.file)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def running(stored: Path) -> Iterator[Signer]:
    with signer(content=["mine-*"], storage=f"file://{stored}") as found:
        yield found


class Line:
    """A raw line to the signer."""

    def __init__(self, found: Signer) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(found.socket))

    def send(self, body: bytes) -> None:
        self.socket.sendall(len(body).to_bytes(4, "big") + body)

    def answer(self) -> dict[str, Any]:
        return wire.decode(self._exactly(int.from_bytes(self._exactly(4), "big")))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            portion = self.socket.recv(size - len(data))
            assert portion, "the signer hung up"
            data += portion
        return data

    def each_of(self, count: int) -> list[dict[str, Any]]:
        """So many answers, in frames of any number."""
        found: list[Any] = []
        while len(found) < count:
            found += wire.decode_each(self._exactly(int.from_bytes(self._exactly(4), "big")))
        assert len(found) == count
        return found


def path(item: Entry, number: object = 7, **more: Any) -> dict[str, Any]:
    return {"kind": "path", "key": "operator-1", "narinfo": item.info.render().decode(),
            "file": None, "id": number} | more  # fmt: skip


NESTED = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"kind":"keys","id":' + NESTED + b"}",
        b'{"kind":"keys","id":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b'{"kind":"keys","id":"' + b"x" * 1_000_000 + b'"}',
        b'{"kind":"keys","id":1e999}',
        b'{"kind":"keys","id":NaN}',
        b'{"kind":"keys","id":true}',
        b'{"kind":"keys","id":-1}',
        b'{"kind":"keys","id":' + b"9" * 4000 + b"}",
        b'{"kind":"keys","id":null}',
        b'{"kind":"keys"}',
        b'{"kind":"keys","id":1,"more":' + b"[],[" * 20 + b"]" * 20 + b"}",
        b'{"kind":"keys","id":1,"more":[' + b"[]," * 1_000_000 + b"[]]}",
        json.dumps(path(ITEM, [1])).encode(),
        json.dumps(path(ITEM, file=["a"])).encode(),
        json.dumps(path(ITEM, narinfo={"a": 1})).encode(),
    ],
    ids=lambda body: body[:40].decode() + f"({len(body)})",
)
def test_what_is_not_flat_or_has_no_number_is_refused_and_the_signer_goes_on(
    body: bytes, running: Signer
) -> None:
    line = Line(running)
    line.send(body)
    answer = line.answer()
    assert "refused" in answer and not {"signature", "keys"} & answer.keys()
    assert len(json.dumps(answer)) < 9000
    line.send(json.dumps({"kind": "keys", "id": 2}).encode())
    assert line.answer()["keys"]
    line.socket.close()


@pytest.mark.parametrize(
    "request_",
    [
        {"kind": "realisation", "key": "operator-1", "name": "realisations/\ud800", "body": "{}"},
        {"kind": "realisation", "key": "operator-1", "name": "x", "body": '{"id":"\udfff"}'},
        path(ITEM, narinfo="StorePath: \ud800"),
        path(ITEM, file="\ud800"),
        {"kind": "digest", "key": "release", "digest": "\ud800"},
        {"kind": "statement", "key": "release", "statement": "\ud800"},
        {"kind": "\ud800", "key": "\ud800"},
        {"kind": "revocation", "key": "operator-1", "of": "key", "name": "\ud800", "reason": "r"},
    ],
)
def test_a_lone_surrogate_is_refused_and_no_fault(
    request_: dict[str, Any], running: Signer
) -> None:
    line = Line(running)
    line.send(json.dumps(request_ | {"id": 3}).encode())
    answer = line.answer()
    assert (answer["id"], answer.get("reason")) == (3, "malformed"), answer
    assert "Traceback" not in running.errors.read_text()
    line.socket.close()


@pytest.mark.parametrize("item", HASHED, ids=lambda item: item.info.compression)
def test_nars_of_every_compression_are_hashed(item: Entry, running: Signer) -> None:
    line = Line(running)
    file = item.info.url.removeprefix("nar/")
    line.send(json.dumps(path(item, file=file)).encode())
    answer = line.answer()
    assert "signature" in answer, answer
    wrong = replace(item.info, nar_size=item.info.nar_size + 1)
    request = path(item, file=file) | {"narinfo": wrong.render().decode()}
    line.send(json.dumps(request).encode())
    assert "refused" in line.answer()
    line.socket.close()


def test_a_bounded_number_of_signatures_is_tried(running: Signer) -> None:
    """Rubbish by trusted names, eight of it, and then the good one: it is not looked for that far."""
    good = UPSTREAM.sign(ITEM.info.fingerprint())
    rubbish = [Signature(UPSTREAM.name, bytes([n]) * 64) for n in range(20)]
    for count, outcome in ((7, "signature"), (8, "refused")):
        line = Line(running)
        info = replace(ITEM.info, signatures=(*rubbish[:count], good))
        text = info.render().decode()
        lines = [f"Sig: {signature}" for signature in (*rubbish[:count], good)]
        text = "\n".join([*(n for n in text.splitlines() if not n.startswith("Sig:")), *lines, ""])
        line.send(json.dumps(path(ITEM, narinfo=text)).encode())
        answer = line.answer()
        assert outcome in answer, (count, answer)
        line.socket.close()


def test_a_bounded_number_of_keys_of_one_name_is_tried() -> None:
    """The bound is on both together: eight keys of one name, and one signature by the ninth."""
    same = [replace(key(f"same-{n}").public, name="same-1") for n in range(9)]
    with signer(trusted_keys=[str(public) for public in same]) as found:
        for n, outcome in ((7, "signature"), (8, "refused")):
            message = ITEM.info.fingerprint()
            signature = replace(key(f"same-{n}").sign(message), key_name="same-1")
            item = replace(ITEM, info=ITEM.info.with_signatures((signature,)))
            line = Line(found)
            line.send(json.dumps(path(item)).encode())
            assert outcome in line.answer(), n
            line.socket.close()


def test_a_group_larger_than_the_rate_is_signed_in_parts() -> None:
    with signer(rate=10) as found:
        line = Line(found)
        for number in range(40):
            line.send(json.dumps(path(ITEM, number)).encode())
        answers = [line.answer() for _ in range(40)]
        assert {answer["id"] for answer in answers} == set(range(40))
        assert all("signature" in answer for answer in answers)
        assert len(found.log.read_text().splitlines()) == 40
        line.socket.close()


async def test_beyond_the_rate_narseal_says_come_again_and_remembers_nothing(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"app-{n}", compression="zstd").signed(UPSTREAM) for n in range(4)]
    upstream.add(*items)
    with signer(per_day=2) as found:
        async with narseal(
            tmp_path, {"url": upstream.url}, signing={"key": [{"url": found.url}]}
        ) as client:
            answers = await asyncio.gather(*(client.get(f"{i.hash}.narinfo") for i in items))
            assert sorted(status for status, _, _ in answers) == [200, 200, 503, 503]
            late = [(i, headers) for i, (status, _, headers) in zip(items, answers, strict=True)
                    if status == 503]  # fmt: skip
            assert all(int(headers["Retry-After"]) > 0 for _, headers in late)
            file = found.folder / "signer.toml"
            found.kill()
            file.write_text(file.read_text().replace("per_day = 2", "per_day = 0"))
            found.start()
            found.wait()
            for item, _ in late:
                info = await client.narinfo(item.hash)
                assert any(s.key_name == OPERATOR.name for s in info.signatures)


def several(*requests: object) -> bytes:
    return json.dumps(requests).encode()


def test_requests_of_a_frame_are_answered_each(running: Signer) -> None:
    """Bad ones among them are refused one by one, and the good ones are signed and written down."""
    good = [entry(f"several-{n}", b"%d" % n).signed(UPSTREAM) for n in range(20)]
    bad: list[object] = [
        path(ITEM, 101, narinfo="rubbish"), path(entry("unsigned"), 102), path(ITEM, 103, key="x"),
        path(ITEM, 104, file=["a"]), path(ITEM, 105, narinfo="StorePath: \ud800"),
        {"id": 106}, {"id": 107, "kind": "raw", "message": "x"},
    ]  # fmt: skip
    nameless: list[object] = [7, None, "x", [path(ITEM, 8)], {}, path(ITEM, "9"), path(ITEM, -1)]
    requests = [path(item, n) for n, item in enumerate(good)]
    mixed = [each for trio in zip(requests, [*bad, *nameless, *bad], strict=False) for each in trio]
    line = Line(running)
    line.send(several(*mixed, {"id": 200, "kind": "keys"}))
    answers = line.each_of(len(mixed) + 1)
    by_id = {tree["id"]: tree for tree in answers}
    for n, item in enumerate(good):
        signature = Signature(OPERATOR.name, base64.b64decode(by_id[n]["signature"]))
        assert OPERATOR.public.verifies(item.info.fingerprint(), signature)
    assert by_id[200]["keys"]
    assert all("refused" in by_id[number] for number in range(101, 108))
    assert sum(tree["id"] is None and "refused" in tree for tree in answers) == len(nameless)
    subjects = [json.loads(text).get("subject") for text in running.log.read_text().splitlines()]
    for item in good:
        assert subjects.count(f"/nix/store/{item.info.store_path}") == 1
    line.socket.close()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"[" + b",".join([json.dumps(path(ITEM, 1)).encode()] * (wire.MAX_SEVERAL + 1)) + b"]",
        several(path(ITEM, 1), {"id": 2, "kind": "x" * wire.MAX_SEVERAL_BYTES}),
        b"[" + json.dumps(path(ITEM, 1)).encode(),
        b"[" + json.dumps(path(ITEM, 1)).encode() + b",]",
        several(path(ITEM, 1)) + b"]",
        b"[" * 50_000 + b"]" * 50_000,
        b" \r\n\t[" + NESTED + b"]",
        b'[{"kind":"keys","id":1,"id":1}]',
        b"[NaN]",
    ],
    ids=lambda body: body[:20].decode() + f"({len(body)})",
)
def test_a_frame_of_too_many_or_too_much_is_refused_once(body: bytes, running: Signer) -> None:
    before = running.log.read_bytes() if running.log.exists() else b""
    line = Line(running)
    line.send(body)
    [answer] = line.each_of(1)
    assert answer["id"] is None and answer["reason"] == "malformed", answer
    line.send(json.dumps({"kind": "keys", "id": 2}).encode())
    assert line.each_of(1)[0]["keys"]
    assert (running.log.read_bytes() if running.log.exists() else b"") == before
    line.socket.close()


def test_who_sends_one_request_a_frame_gets_one_answer_a_frame(running: Signer) -> None:
    """A narseal of before knows of no others, whatever one beside it sends."""
    new, old = Line(running), Line(running)
    new.send(several(*(path(ITEM, n) for n in range(30))))
    for n in range(30):
        old.send(json.dumps(path(ITEM, n)).encode())
    assert {old.answer()["id"] for _ in range(30)} == set(range(30))
    assert len(new.each_of(30)) == 30
    new.socket.close()
    old.socket.close()


def resident(found: Signer) -> int:
    """Bytes of memory that the signer has."""
    assert found.process
    for text in Path(f"/proc/{found.process.pid}/status").read_text().splitlines():
        if text.startswith("VmRSS:"):
            return int(text.split()[1]) << 10
    raise AssertionError


def push(sock: socket.socket, data: bytes) -> int:
    """Send as much as the other side takes."""
    sock.settimeout(1)
    sent = 0
    with suppress(TimeoutError):
        while sent < len(data):
            sent += sock.send(data[sent : sent + (1 << 20)])
    return sent


def test_what_waits_is_bounded_in_bytes() -> None:
    """Of a user, not of a connection: half of each of 12 large frames, and nobody else is kept out."""
    with signer() as found:
        Line(found).send(b"{}")
        before = resident(found)
        lines = [Line(found) for _ in range(12)]
        half = (wire.MAX_BYTES).to_bytes(4, "big") + b" " * (wire.MAX_BYTES - 1)
        sent = sum(push(line.socket, half) for line in lines)
        assert sent < 3 * wire.MAX_BYTES  # the others are not read
        assert resident(found) - before < 4 * wire.MAX_BYTES
        for line in lines:
            line.socket.close()
        line = Line(found)
        line.send(json.dumps(path(ITEM)).encode())
        assert "signature" in line.answer()
        for _ in range(4):  # their room is given back
            line.send(b"x" * wire.MAX_BYTES)
            assert "refused" in line.answer()
        line.socket.close()


def test_who_does_not_read_is_not_read() -> None:
    with signer() as found:
        line = Line(found)
        before = resident(found)
        body = json.dumps({"kind": "keys", "id": 1}).encode()
        request = len(body).to_bytes(4, "big") + body
        sent = push(line.socket, request * 400_000)
        assert sent < len(request) * 400_000
        assert resident(found) - before < 32 << 20
        other = Line(found)
        other.send(json.dumps(path(ITEM)).encode())
        assert "signature" in other.answer()
        line.socket.settimeout(PATIENCE)
        for _ in range(sent // len(request)):  # none is lost, once it reads
            assert line.answer()["keys"]
        for each in (line, other):
            each.socket.close()
