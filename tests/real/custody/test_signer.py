"""The signer as another user: it signs what there is evidence for, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from narseal.cosign import statement
from narseal.cosign.bundle import Envelope, SignedBy, render
from narseal.cosign.statement import PAYLOAD_TYPE, AttestedPath
from narseal.custody import wire, write_private
from narseal.custody.agent import AgentCosignKey, AgentKey
from narseal.custody.file import FileKey
from narseal.custody.requests import PathRequest
from narseal.errors import Unavailable
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keys import Signature
from narseal.signer import audit
from tests.faults.test_uploads import Uploader, add
from tests.tools.asking import must_come
from tests.tools.cache import Entry, addressed, entry, key, store_path
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.memory import in_memory
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal, narseal_process
from tests.tools.nix import nix
from tests.tools.signer import AUDIT, USER, Signer, as_user, signer
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually, until

pytestmark = pytest.mark.real

ITEM = entry("app-1", b"x", compression="zstd").signed(UPSTREAM)
STRANGER = key("stranger-1")


@pytest.fixture(scope="module")
def stored() -> Iterator[Path]:
    """A storage folder with files that the signer may hash."""
    folder = Path(tempfile.mkdtemp(prefix="narseal-stored-"))
    folder.chmod(0o755)  # the signer is another user
    (folder / "nar").mkdir(parents=True)
    for name in ("mine-1", "other-1"):
        item = entry(name, b"content", compression="zstd")
        (folder / item.info.url).write_bytes(item.file)
    for item in (PLAIN, ADDRESSED):
        (folder / item.info.url).write_bytes(item.file)
    wrong = entry("mine-wrong", b"right", compression="none")
    (folder / wrong.info.url).write_bytes(entry("mine-wrong", b"wrong", compression="none").file)
    (folder / "secret").write_text("not a NAR")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def running(stored: Path) -> Iterator[Signer]:
    with signer(content=["mine-*"], storage=f"file://{stored}") as found:
        yield found


class Asking:
    """A raw line to the signer."""

    def __init__(self, found: Signer) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(found.socket))

    def ask(self, **tree: Any) -> dict[str, Any]:
        return wire.ask(self.socket, {"id": 7, **tree})


@pytest.fixture
def asking(running: Signer) -> Iterator[Asking]:
    line = Asking(running)
    yield line
    line.socket.close()


def path(item: Entry, file: str | None = None, **more: Any) -> dict[str, Any]:
    text = item.info.render().decode()
    return {"kind": "path", "key": "operator-1", "narinfo": text, "file": file} | more


def swapped(item: Entry, old: str, new: str) -> dict[str, Any]:
    request = path(item)
    assert old in request["narinfo"]
    return request | {"narinfo": request["narinfo"].replace(old, new)}


def named(item: Entry) -> str:
    return item.info.url.removeprefix("nar/")


def own_statement(**changed: Any) -> dict[str, Any]:
    assert ITEM.info.file_hash
    data = statement.render([AttestedPath(ITEM.info, named(ITEM), ITEM.info.file_hash)])
    change: Callable[[Any], Any] | None = changed.pop("change", None)
    if change:
        tree = json.loads(data)
        change(tree)
        data = json.dumps(tree, separators=(",", ":")).encode()
    data = changed.pop("data", data)
    return {"kind": "statement", "key": "release",
            "statement": base64.b64encode(data).decode()} | changed  # fmt: skip


def realisation(out: str, *, signed: bool = False) -> dict[str, Any]:
    ident = f"sha256:{'a' * 64}!out"
    body = {"id": ident, "outPath": out, "signatures": [], "dependentRealisations": {}}
    if signed:
        from narseal.nix.realisation import Realisation

        real = Realisation.parse(json.dumps(body).encode(), id=ident)
        body["signatures"] = [str(UPSTREAM.sign(real.fingerprint()))]
    return {"kind": "realisation", "key": "operator-1", "name": f"realisations/{ident}.doi",
            "body": json.dumps(body)}  # fmt: skip


def trace(derivation: str, out: str) -> dict[str, Any]:
    """A realisation as Nix writes it from 2.35 on: its derivation has a name."""
    return {"kind": "realisation", "key": "operator-1",
            "name": f"build-trace-v2/{store_path(derivation)}/out.doi",
            "body": json.dumps({"outPath": out, "signatures": []})}  # fmt: skip


SELF = store_path("ca-1")
FLAT = ContentAddress(Method.FLAT, Hash.sha256(b"flat"))
CA_PATH = FLAT.store_path("ca-1", (), self_hash="", store_dir="/nix/store")
ADDRESSED = addressed("ca-2", b"addressed")
MINE, OTHER = (entry(n, b"content", compression="zstd") for n in ("mine-1", "other-1"))
PLAIN = entry("mine-plain", b"content", compression="none")
WRONG = entry("mine-wrong", b"right", compression="none")
BIG = "x" * (2 << 20)
F = ITEM.info.fingerprint().decode()

#: What somebody who took the proxy over could try; each with a word of the refusal.
ATTEMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "unsigned": (path(ITEM.signed()), "no signature by a trusted key"),
    "signed by a stranger": (path(ITEM.signed(STRANGER)), "no signature by a trusted key"),
    "a stranger under the upstream's name": (
        path(ITEM.signed(key("x"))
             .but(signatures=(replace(STRANGER.sign(ITEM.info.fingerprint()),
                                      key_name="upstream-1"),))), "no signature"),
    "another NarHash": (
        swapped(ITEM, ITEM.info.nar_hash.nix32, Hash.sha256(b"evil").nix32), "no signature"),
    "another NarSize": (swapped(ITEM, f"NarSize: {ITEM.info.nar_size}", "NarSize: 1"), "no sig"),
    "another path": (swapped(ITEM, "-app-1\n", "-app-2\n"), "no signature"),
    "another hash part": (swapped(ITEM, ITEM.hash, store_path("evil").hash_part), "no signature"),
    "a reference more": (
        swapped(ITEM, "References: ", f"References: {store_path('evil')}"), "no signature"),
    "another store dir": (swapped(ITEM, "/nix/store/", "/evil/store/"), "narinfo"),
    "no store dir": (swapped(ITEM, "/nix/store/", ""), "narinfo"),
    "a newline in a name": (swapped(ITEM, "-app-1\n", "-app-1\n\nStorePath: x\n"), "narinfo"),
    "a CR": (swapped(ITEM, "-app-1\n", "-app-1\r\n"), "narinfo"),
    "a NUL": (swapped(ITEM, "-app-1\n", "-app-1\0\n"), "narinfo"),
    "a field twice": (swapped(ITEM, "NarSize", "NarSize: 1\nNarSize"), "narinfo"),
    "a semicolon in a name": (swapped(ITEM, "-app-1\n", "-app;1\n"), ""),
    "a name too long": (swapped(ITEM, "-app-1\n", f"-{'a' * 300}\n"), ""),
    "a plus before the size": (swapped(ITEM, "NarSize: ", "NarSize: +"), "narinfo"),
    "a hash in capitals": (
        swapped(ITEM, ITEM.info.nar_hash.nix32, ITEM.info.nar_hash.nix32.upper()), ""),
    "sha1": (swapped(ITEM, f"sha256:{ITEM.info.nar_hash.nix32}", "sha1:" + "0" * 32), ""),
    "no ASCII": (swapped(ITEM, "-app-1\n", "-äpp-1\n"), "ASCII"),
    "two MiB of narinfo": (path(ITEM, narinfo=f"StorePath: {BIG}\n"), "narinfo"),
    "a number for a narinfo": (path(ITEM, narinfo=7), "texts"),
    "a raw message": ({"kind": "raw", "key": "operator-1", "message": "x"}, "of this kind"),
    "a fingerprint as it is": ({"kind": "fingerprint", "key": "operator-1", "text": F}, "kind"),
    "a message besides": (path(ITEM, message="x"), "no others"),
    "no kind": ({"key": "operator-1"}, "of this kind"),
    "no key": ({"kind": "path"}, "no substituter key"),
    "another key": (path(ITEM, key="nobody-1"), "no substituter key"),
    "the audit key": (path(ITEM, key="audit-1"), "no substituter key"),
    "the cosign key for a path": (path(ITEM, key="release"), "no substituter key"),
    "a list for a key": (path(ITEM, key=["operator-1"]), "no objects or arrays"),
    "content under another name": (path(OTHER, named(OTHER)), "not among those"),
    "content without a file": (path(MINE), "no file to hash"),
    "content of another file": (path(MINE, named(WRONG)), ""),
    "content that is wrong": (path(WRONG, named(WRONG)), ""),
    "content that is not there": (path(MINE, "0" * 52 + ".nar.zst"), "cannot be read"),
    "a file elsewhere": (path(MINE, "../secret"), "no file to hash"),
    "a file by its whole path": (path(MINE, "/etc/passwd"), "no file to hash"),
    "a file with a NUL": (path(MINE, named(MINE) + "\0"), "no file to hash"),
    "a CA of another path": (
        path(ITEM.signed().but(ca=FLAT)), "its CA recomputes"),
    "a CA that leaves the NarHash open": (
        path(entry("ca-1", b"x", path=CA_PATH, ca=FLAT)), "no file to hash"),
    "a CA that says nothing of the size": (
        path(ADDRESSED.but(nar_size=ADDRESSED.info.nar_size + 8), named(ADDRESSED)), ""),
    "a CA without a file": (path(ADDRESSED), "no file to hash"),
    "a realisation of a foreign derivation": (
        trace("openssl.drv", str(MINE.info.store_path)), "openssl is not among"),
    "a realisation of a derivation without a name": (
        realisation(str(MINE.info.store_path)), "is not among"),
    "a realisation unsigned": (realisation(str(ITEM.info.store_path)), "no signature by a"),
    "a realisation elsewhere": (
        realisation("mine-1") | {"name": "../../etc/passwd"}, "no address of a realisation"),
    "a realisation of another output": (
        realisation(str(MINE.info.store_path))
        | {"name": f"realisations/sha256:{'b' * 64}!out.doi"}, "another output"),
    "a statement of another type": (
        own_statement(change=lambda t: t.update(predicateType="https://slsa.dev/provenance/v1")),
        "not a statement of"),
    "a statement about another store": (
        own_statement(change=lambda t: t["predicate"]["paths"][0].update(storePath="/x/y")),
        "is not in /nix/store"),
    "a subject more": (
        own_statement(change=lambda t: t["subject"].append(
            {"name": "x", "digest": {"sha256": "0" * 64}})), "byte for byte"),
    "a field more": (
        own_statement(change=lambda t: t["predicate"]["paths"][0].update(x=1)), "other fields"),
    "a statement with white space": (own_statement(data=b" {}"), "not an in-toto statement"),
    "a statement that is none": (own_statement(data=b"\xff"), "not JSON"),
    "a statement not in base-64": (own_statement(statement="%"), "base-64"),
    "a statement with a substituter key": (own_statement(key="operator-1"), "no cosign key"),
    "a digest": ({"kind": "digest", "key": "release", "digest": "0" * 64}, "not signed here"),
    "a digest with a substituter key": (
        {"kind": "digest", "key": "operator-1", "digest": "0" * 64}, "no cosign key"),
}  # fmt: skip


def test_there_are_at_least_40_attempts() -> None:
    assert len(ATTEMPTS) >= 50


@pytest.mark.parametrize("name", ATTEMPTS)
def test_nothing_foreign_is_signed(name: str, asking: Asking, running: Signer) -> None:
    request, word = ATTEMPTS[name]
    before = running.log.read_bytes() if running.log.exists() else b""
    answer = asking.ask(**request)
    assert "signature" not in answer
    assert word in answer["refused"], answer
    assert running.log.read_bytes() == before
    assert "not signed" in running.errors.read_text()


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\5hello", b"\0\0\0\2[]", b"\0\0\0\2{}", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n",
     b"\0\0\x27\x10" + b"[" * 10_000],
)  # fmt: skip
def test_rubbish_is_answered_or_hung_up_on(data: bytes, running: Signer) -> None:
    line = Asking(running)
    line.socket.sendall(data)
    line.socket.shutdown(socket.SHUT_WR)
    answer = line.socket.recv(4096)
    assert b"signature" not in answer
    line.socket.close()
    assert "keys" in Asking(running).ask(kind="keys")


def test_what_there_is_evidence_for_is_signed_and_written_down(
    asking: Asking, running: Signer
) -> None:
    good = [
        (path(ITEM), "signature upstream-1", ITEM.info.fingerprint()),
        (path(MINE, named(MINE)), "content", MINE.info.fingerprint()),
        (path(PLAIN, named(PLAIN)), "content", PLAIN.info.fingerprint()),
        (path(ADDRESSED, named(ADDRESSED)), "content-address", ADDRESSED.info.fingerprint()),
        (path(ITEM.signed(OPERATOR)), "signature operator-1", ITEM.info.fingerprint()),
    ]
    for request, evidence, message in good:
        answer = asking.ask(**request)
        assert "signature" in answer, answer
        data = base64.b64decode(answer["signature"])
        assert OPERATOR.public.verifies(message, replace(OPERATOR.sign(b""), data=data))
        last = json.loads(running.log.read_text().splitlines()[-1])
        assert (last["evidence"], last["uid"], last["pid"]) == (evidence, os.geteuid(), os.getpid())
        assert last["subject"].startswith("/nix/store/")
    for request in (realisation(str(ITEM.info.store_path), signed=True),
                    trace("mine-1.drv", str(MINE.info.store_path)), own_statement()):  # fmt: skip
        assert "signature" in asking.ask(**request), request
    report = audit.verify(running.log, AUDIT.public)
    assert report.problems == ()
    # the proxy's user, were it not root, could not read any of it
    for name in ("operator.secret", "cosign.key", "audit.secret"):
        status = (running.folder / name).stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o600, USER.pw_uid)


def test_another_user_is_turned_away(running: Signer) -> None:
    program = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        's.sendall(b\'\\0\\0\\0\\x17{"id":1,"kind":"keys"} \'); print(s.recv(100))'
    )
    words = [*as_user(1), sys.executable, "-c", program, str(running.socket)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "ed25519" not in done.stdout, done
    assert "turned away" in running.errors.read_text()


def test_nobody_looks_into_the_signer(running: Signer) -> None:
    """Not even its own user: no core, no ptrace; and its memory is not for swap."""
    assert running.process is not None
    pid = running.process.pid
    done = subprocess.run(
        [*as_user(USER.pw_uid), "dd", f"if=/proc/{pid}/mem", "count=1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Permission denied" in done.stderr
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)
    locked = re.search(r"VmLck:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert locked and int(locked[1]) > 0


def test_rates_of_the_operator_hold() -> None:
    with signer(per_day=3, rate=1) as found:
        line = Asking(found)
        start = time.monotonic()
        for _ in range(3):  # each waits for its second
            assert "signature" in line.ask(**path(ITEM))
        assert time.monotonic() - start > 1.9
        assert "today (per_day)" in line.ask(**path(ITEM))["error"]
        assert len(running_lines(found)) == 3


def running_lines(found: Signer) -> list[str]:
    return found.log.read_text().splitlines()


def test_nothing_is_signed_when_the_log_cannot_be_written() -> None:
    """A full disk: no signature leaves, and the log goes on whole when there is room again."""
    with signer() as found:
        assert "signature" in Asking(found).ask(**path(ITEM))
        found.kill(signal.SIGTERM)
        found.start(file_size=found.log.stat().st_size + 400)
        found.wait()
        line = Asking(found)
        answers = [line.ask(**path(ITEM)) for _ in range(4)]
        assert "signature" in answers[0]
        for answer in answers[1:]:
            assert "audit log cannot be written" in answer["error"]
        found.kill()
        found.start()
        found.wait()
        assert "signature" in Asking(found).ask(**path(ITEM))
        assert audit.verify(found.log, AUDIT.public).problems == ()
        kinds = [json.loads(line)["kind"] for line in running_lines(found)]
        assert kinds == ["path", "checkpoint", "path", "path"]


async def test_nix_and_cosign_accept_what_it_signs(
    cosign: Cosign, tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    with signer() as found:
        keys = {"key": [{"url": f"{found.url}?key=operator-1"}]}
        there = {"url": upstream.url}
        by_agent = {"mode": "key", "key": f"{found.url}?key=release", "batch_max_age": "100ms"}
        with narseal_process(tmp_path, there, signing=keys, cosign=by_agent) as process:
            with nix() as client:
                client.config["trusted-public-keys"] = process.public_key
                await asyncio.to_thread(
                    client.run, "nix", "copy", "--from", process.url, "--to",
                    f"local?root={client.path('store')}", f"/nix/store/{ITEM.info.store_path}",
                )  # fmt: skip
            async with aiohttp.ClientSession() as session:
                address = f"{process.url}/attestations/sha256:{ITEM.info.nar_hash.digest.hex()}"
                body = await must_come(session, address)
                async with session.get(f"{process.url}/cosign.pub") as response:
                    public = await response.read()
            # the key is nowhere in the proxy
            assert_not_in_memory([process.process.pid, *process.workers()])
            assert OPERATOR.render().split(":")[1] not in process.log.read_text()
        file, bundle, pub = (cosign.folder / name for name in ("x.nar.zst", "b.json", "cosign.pub"))
        file.write_bytes(ITEM.file)
        bundle.write_bytes(body)
        pub.write_bytes(public)
        words: list[str | Path] = ["verify-blob-attestation", "--key", pub, "--bundle", bundle]
        words += ["--type", statement.PREDICATE_TYPE, "--insecure-ignore-tlog"]
        cosign.run(*words, file)


SEED = base64.b64decode(OPERATOR.render().split(":")[1])[:32]
TEXT = OPERATOR.render().split(":")[1][:40].encode()
PUBLIC = OPERATOR.public.data


def assert_not_in_memory(pids: list[int]) -> None:
    """Neither the seed nor its base-64 is in the memory of these processes; the public half is."""
    for pid in pids:
        seeds, texts, publics = in_memory(pid, SEED, TEXT, PUBLIC)
        assert (seeds, texts) == (0, 0)
        assert publics > 0


async def test_a_key_file_is_in_locked_memory_alone(tmp_path: Path, upstream: FakeCache) -> None:
    """With `file:` the proxy holds it: the seed in one locked page, its base-64 nowhere."""
    upstream.add(ITEM)
    with narseal_process(tmp_path, {"url": upstream.url}) as process:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{process.url}/{ITEM.hash}.narinfo") as response:
                assert response.status == 200
        assert in_memory(process.process.pid, SEED, TEXT) == [0, 0]
        assert in_memory(process.workers()[0], SEED, TEXT) == [1, 0]


async def test_signer_killed_and_restarted_under_load(tmp_path: Path, upstream: FakeCache) -> None:
    """Requests wait, or get 503 with Retry-After; none is served unsigned, no flight is lost."""
    items = [entry(f"l{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(600)]
    upstream.add(*items)
    with signer() as found:
        keys = {"key": [{"url": found.url}]}
        async with narseal(tmp_path, {"url": upstream.url}, signing=keys) as client:
            statuses: list[int] = []
            waiting = iter(items)

            async def read() -> None:
                for item in waiting:
                    while True:
                        status, body, headers = await client.get(f"{item.hash}.narinfo")
                        statuses.append(status)
                        if status == 200:
                            assert b"Sig: operator-1:" in body
                            break
                        assert (status, headers["Retry-After"]) == (503, "5"), body
                        await asyncio.sleep(0.05)

            async def trouble() -> None:
                await asyncio.sleep(0.2)
                found.kill()
                await asyncio.sleep(0.4)
                found.start()
                await asyncio.to_thread(found.wait)
                await client.narinfo(items[-1].hash)  # at once, not after a pause for retries

            found_trouble = asyncio.create_task(trouble())
            await asyncio.gather(*(read() for _ in range(32)))
            await found_trouble
            assert statuses.count(200) == len(items)
            # gone for longer than anybody waits
            found.kill()
            fresh = entry("fresh", b"fresh", compression="none").signed(UPSTREAM)
            upstream.add(fresh)
            status, _, headers = await client.get(f"{fresh.hash}.narinfo")
            assert (status, headers["Retry-After"]) == (503, "5")
            assert (await client.get(f"{items[0].hash}.narinfo"))[
                0
            ] == 200  # what was signed goes on
            found.start()
            await asyncio.to_thread(found.wait)
            await client.narinfo(fresh.hash)


async def signed_by(agent: AgentKey, item: Entry) -> Signature:
    """As often as the signer is found away."""
    while True:
        try:
            return await agent.sign(PathRequest(item.info, None))
        except Unavailable:
            await asyncio.sleep(0.05)


async def test_the_log_goes_on_after_kill_9(upstream: FakeCache) -> None:
    with signer() as found:
        for round_ in range(5):
            agent = AgentKey(found.url)
            items = [entry(f"k{round_}-{n}", b"%d" % n, compression="none").signed(UPSTREAM)
                     for n in range(200)]  # fmt: skip
            asked = [asyncio.create_task(signed_by(agent, i)) for i in items]
            await asyncio.sleep(0.03 * round_)
            found.kill()
            found.start()
            await asyncio.to_thread(found.wait)
            signatures = await asyncio.gather(*asked)
            for item, signature in zip(items, signatures, strict=True):
                assert OPERATOR.public.verifies(item.info.fingerprint(), signature)
            agent.close()
        found.kill(signal.SIGTERM)
        report = audit.verify(found.log, AUDIT.public)
        assert report.problems == ()
        subjects = {json.loads(line).get("subject") for line in running_lines(found)}
        assert len(subjects - {None}) == 1000  # each that was signed is written down


async def test_what_was_uploaded_is_signed_by_a_later_key(tmp_path: Path) -> None:
    """It has no URL of an upstream's; a signer refused each of them when the key was changed."""
    later = key("operator-2")
    file = tmp_path / "later.secret"
    write_private(file, later.render())
    if os.geteuid() == 0:
        os.chown(file, USER.pw_uid, USER.pw_gid)
    home = tmp_path / "narseal"
    token = add(tmp_path)
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    item = entry("mine-1", b"uploaded", compression="zstd")
    with signer(
        content=["mine-*"], storage=f"file://{home}/storage",
        keys_beside=[{"url": f"file:{file}"}],
    ) as found:  # fmt: skip
        names = (OPERATOR.public.name, later.public.name)
        urls = [{"url": f"{found.url}?key={name}"} for name in names]
        async with narseal(home, signing={"key": urls[:1]}, upload=upload) as client:
            assert (await Uploader(client, token).path(item))[0] == 201
        async with narseal(home, signing={"key": urls}) as client:

            async def signed() -> bool:
                info = await client.narinfo(item.hash)
                return {s.key_name for s in info.signatures} == set(names)

            await eventually(signed)
            info = await client.narinfo(item.hash)
            assert any(later.public.verifies(info.fingerprint(), s) for s in info.signatures)


async def test_agent_signs_as_the_file_does(running: Signer) -> None:
    agent = AgentKey(f"{running.url}?key=operator-1")
    by_file = FileKey.load(f"file:{running.folder}/operator.secret")
    request = PathRequest(ITEM.info, None)
    assert await agent.sign(request) == await by_file.sign(request)
    agent.close()
    cosign = AgentCosignKey(f"{running.url}?key=release")
    assert ITEM.info.file_hash
    data = statement.render([AttestedPath(ITEM.info, named(ITEM), ITEM.info.file_hash)])
    signature = await asyncio.to_thread(cosign.sign_statement, data)
    assert cosign.public.verifies(statement.envelope_digest(data), signature)
    assert render(Envelope(PAYLOAD_TYPE, data, signature), SignedBy(cosign.public))


async def test_a_revocation_is_written_down_and_does_not_end_a_good_key(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The proxy strips; the signer keeps the record. Its own key goes when its operator says so."""
    upstream.add(ITEM)
    with signer() as found:
        keys = {"key": [{"url": f"{found.url}?key=operator-1"}]}
        with narseal_process(tmp_path, {"url": upstream.url}, signing=keys) as process:
            async with aiohttp.ClientSession() as session:
                address = f"{process.url}/{ITEM.hash}.narinfo"
                async with session.get(address) as response:
                    assert b"Sig: operator-1:" in await response.read()
                done = await asyncio.to_thread(
                    narseal_command, "revoke", "operator-1", "--reason", "drill", "--config",
                    tmp_path / "narseal.toml",
                )  # fmt: skip
                assert "revoked operator-1: taken off 1 paths, 0 of them signed" in done.stdout
                async with session.get(address) as response:
                    assert response.status == 503
        last = json.loads(running_lines(found)[-1])
        assert (last["kind"], last["subject"], last["reason"]) == (
            "revocation", "operator-1", "drill",
        )  # fmt: skip
        assert "signature" in Asking(found).ask(**path(ITEM))


def test_checkpoints_are_written_on_a_schedule() -> None:
    with signer(checkpoint="1s") as found:
        line = Asking(found)
        for _ in range(2):
            assert "signature" in line.ask(**path(ITEM))
            until(lambda: json.loads(running_lines(found)[-1])["kind"] == "checkpoint")
        kinds = [json.loads(text)["kind"] for text in running_lines(found)]
        assert kinds == ["path", "checkpoint", "path", "checkpoint"]
        time.sleep(1.2)  # nothing new, no checkpoint
        assert len(running_lines(found)) == 4


def test_no_key_is_in_what_the_program_shows_of_itself(running: Signer) -> None:
    key_ = FileKey.load(f"file:{running.folder}/operator.secret")
    assert running.process is not None
    shown = [repr(key_), repr(vars(key_)), str(key_), running.errors.read_text()]
    for name in ("cmdline", "environ"):
        done = subprocess.run(
            ["cat", f"/proc/{running.process.pid}/{name}"], capture_output=True, text=True
        )
        shown.append(done.stdout)
    with pytest.raises(TypeError, match="not copied"):
        pickle.dumps(key_)
    assert not [text for text in shown if TEXT.decode() in text or SEED.hex() in text]
    key_.close()
    assert set(key_._secret.view) == {0}
