"""Keys that come, go and are revoked, while clients read."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from narseal.custody import write_private
from narseal.nix.narinfo import NarInfo
from narseal.storage import Revocation
from narseal.storage.engine import Engines
from tests.faults.test_uploads import Uploader, add
from tests.tools.cache import Entry, addressed, entry, key
from tests.tools.changing import logged, write
from tests.tools.command import narseal_command
from tests.tools.index import index
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    Client,
    metric,
    narseal,
    narseal_process,
    render_toml,
    settings,
)
from tests.tools.upstream import FakeCache
from tests.tools.waiting import eventually

NEW = key("operator-2")


def both(folder: Path, **new: Any) -> dict[str, Any]:
    """The operator's key and the next one."""
    if not (folder / "new.secret").exists():
        write_private(folder / "new.secret", NEW.render())
    first = {"url": f"file:{folder}/operator.secret"}
    return {"key": [first, {"url": f"file:{folder}/new.secret"} | new]}


def only_new(folder: Path) -> dict[str, Any]:
    return {"key": both(folder)["key"][1:]}


def signers(body: bytes) -> set[str]:
    info = NarInfo.parse(body)
    message = info.fingerprint()
    for signature in info.signatures:
        for known in (OPERATOR, NEW, UPSTREAM):
            if known.public.name == signature.key_name:
                assert known.public.verifies(message, signature)
    return {s.key_name for s in info.signatures}


async def by_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`narseal revoke`, beside what serves."""
    config = folder / "narseal.toml"
    return await asyncio.to_thread(narseal_command, "revoke", *words, "--config", config)


def in_folder(folder: Path) -> list[set[str]]:
    return [signers(p.read_bytes()) for p in (folder / "storage").glob("*.narinfo")]


async def brought(client: Client, items: list[Entry], folder: Path) -> None:
    """All that there is: fetched, and in the folder."""
    for item in items:
        await client.get((await client.narinfo(item.hash)).url)
    await client.until(lambda: len(in_folder(folder)) == len(items))


async def test_a_new_key_signs_everything_in_the_background(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"r{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(40)]
    upstream.add(*items)
    there = {"url": upstream.url}
    with narseal_process(tmp_path, there, workers=2) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, tmp_path / "storage")
            for item in items:
                info = await client.narinfo(item.hash)
                await client.get(info.url)
            seen: list[int] = []

            async def lacking() -> int:
                seen.append(json.loads((await client.get("status"))[1])["lackSignatures"])
                return seen[-1]

            async def under_way() -> bool:
                return 0 < await lacking() < 40

            async def done() -> bool:
                return await lacking() == 0

            began = time.monotonic()
            signing = both(tmp_path) | {"resign_rate": 4}
            write(process, there, workers=2, signing=signing)
            await eventually(under_way)  # progress can be seen
            await eventually(done)
            assert time.monotonic() - began > 39 / 4
            shown_lacking = [count for count in seen if count]
            assert shown_lacking == sorted(shown_lacking, reverse=True)
            # nobody asked for them: the folder has them
            everybody = {"upstream-1", "operator-1", "operator-2"}
            await client.until(lambda: in_folder(tmp_path) == [everybody] * 40)

            async def told() -> bool:  # also by the worker that signed none
                metrics = (await client.get("metrics"))[1].decode()
                return (
                    'narseal_resigned_total{result="signed"} 40.0' in metrics
                    and "narseal_resign_waiting 0.0" in metrics
                )

            await eventually(told)
            shown = await asyncio.to_thread(narseal_command, "status", "--from", process.url)
            assert "operator-2: signs" in shown.stdout
            assert "0 paths lack" in shown.stdout


async def test_keys_sign_from_their_beginning_to_their_end(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"w{n}", b"%d" % n).signed(UPSTREAM) for n in range(60)]
    upstream.add(*items)
    begins = datetime.now(UTC) + timedelta(seconds=3)
    ends = begins + timedelta(seconds=2)
    tmp_path.mkdir(exist_ok=True)
    write_private(tmp_path / "operator.secret", OPERATOR.render())
    keys = both(tmp_path, not_before=begins)
    keys["key"][0]["not_after"] = ends
    async with narseal(tmp_path, {"url": upstream.url}, signing=keys) as client:

        async def names(item: Entry) -> set[str]:
            return signers((await client.get(f"{item.hash}.narinfo"))[1]) - {"upstream-1"}

        asked = begins
        for item in items:
            asked = datetime.now(UTC)
            found = await names(item)
            answered = datetime.now(UTC)
            if answered < begins:
                assert found == {"operator-1"}
            elif begins <= asked and answered < ends:
                assert found == {"operator-1", "operator-2"}
            elif ends <= asked:
                assert found == {"operator-2"}
            await asyncio.sleep(0.1)
        assert begins < asked

        async def first_has_ended() -> bool:
            status = json.loads((await client.get("status"))[1])
            return [k["active"] for k in status["keys"]] == [False, True]

        await eventually(first_has_ended)
        last = entry("last", b"last").signed(UPSTREAM)
        upstream.add(last)
        assert await names(last) == {"operator-2"}


async def test_without_any_active_key_nothing_is_served_unsigned(
    tmp_path: Path, upstream: FakeCache
) -> None:
    item = entry("u", b"u").signed(UPSTREAM)
    upstream.add(item)
    tmp_path.mkdir(exist_ok=True)
    write_private(tmp_path / "operator.secret", OPERATOR.render())
    past = [{"url": f"file:{tmp_path}/operator.secret", "not_after": "2020-01-01T00:00:00Z"}]
    async with narseal(tmp_path, {"url": upstream.url}, signing={"key": past}) as client:
        status, body, headers = await client.get(f"{item.hash}.narinfo")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert b"no key of the operator's is active" in body


async def test_a_revoked_key_that_is_still_configured_is_named_and_not_offered(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The start printed it for nix.conf, and nothing said that it signs no more."""
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public)]}
    signing = both(tmp_path)
    with narseal_process(tmp_path, there, signing=signing):
        pass
    for name in (OPERATOR.name, UPSTREAM.name):
        done = await by_command(tmp_path, name, "--reason", "stolen")
        assert done.returncode == 0, done.stderr
    with narseal_process(tmp_path, there, signing=signing) as process:
        assert process.process.stdout
        (offered,) = [
            line
            for line in (process.process.stdout.readline() for _ in range(4))
            if "trusted-public-keys" in line
        ]
        said = process.log.read_text()
    assert str(NEW.public) in offered
    assert str(OPERATOR.public) not in offered
    assert f"the key {OPERATOR.name} is revoked and signs nothing" in said
    assert f"the key {UPSTREAM.name} of {upstream.url} is revoked" in said


async def test_revoked_while_64_readers_read(tmp_path: Path, upstream: FakeCache) -> None:
    """After the command returned, not one answer carries the revoked key's signature."""
    items = [entry(f"v{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(60)]
    upstream.add(*items)
    token = add(tmp_path)
    write_private(tmp_path / "operator.secret", OPERATOR.render())
    signing = both(tmp_path)
    there = {"url": upstream.url}
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    with narseal_process(tmp_path, there, workers=2, upload=upload, signing=signing) as process:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            client = Client(process.url, session, tmp_path / "storage")
            uploaded = entry("uploaded", b"uploaded", compression="none")
            rotten = entry("rotten", b"rotten", compression="none")
            for item in (uploaded, rotten):
                assert (await Uploader(client, token).path(item))[0] == 201
            for item in items:
                await client.get((await client.narinfo(item.hash)).url)
            # nothing speaks for this one any more: its bytes in storage are not what they were
            (client.storage / rotten.info.url).write_bytes(b"\0" * len(rotten.file))
            revoked_at = float("inf")
            late: list[str] = []
            counts = {"before": 0, "after": 0}
            done = asyncio.Event()

            async def read(number: int) -> None:
                while not done.is_set():
                    for item in items:
                        asked = time.monotonic()
                        status, body, _ = await client.get(f"{item.hash}.narinfo")
                        assert status == 200, body
                        names = signers(body)
                        assert "operator-2" in names
                        if asked > revoked_at and "operator-1" in names:
                            late.append(item.hash)
                        counts["after" if asked > revoked_at else "before"] += 1

            readers = [asyncio.create_task(read(n)) for n in range(64)]
            await client.until(lambda: counts["before"] > 100)
            outcome = await by_command(tmp_path, "operator-1", "--reason", "stolen", "--json")
            revoked_at = time.monotonic()
            await client.until(lambda: counts["after"] > 100)
            done.set()
            await asyncio.gather(*readers)
            assert late == []
            tree = json.loads(outcome.stdout)
            assert (outcome.returncode, tree["stripped"] - tree["signed"]) == (1, 1), tree
            assert 1 <= tree["stripped"] <= 62  # a reader's question may have been first
            [lost] = tree["withdrawn"]
            assert lost["path"] == rotten.hash
            assert "nothing else speaks for it" in lost["why"]
            assert (await client.get(f"{rotten.hash}.narinfo"))[0] == 404
            body = (await client.get(f"{uploaded.hash}.narinfo"))[1]
            assert signers(body) == {"operator-2"}
            assert all("operator-1" not in names for names in in_folder(tmp_path))
            keys = json.loads((await client.get("keys"))[1])
            assert [k.split(":")[0] for k in keys["substituter"]] == ["operator-2"]
            assert keys["revoked"][0]["reason"] == "stolen"
            assert (await client.get("pubkey"))[1].startswith(b"operator-2:")
            # a key of that name is not taken from anybody any more
            stolen = entry("stolen", b"evil", compression="none").signed(OPERATOR)
            upstream.add(stolen)
            assert await client.refusal(f"{stolen.hash}.narinfo") == "unsigned"
            checked = await asyncio.to_thread(
                narseal_command, "index", "check", "--config", tmp_path / "narseal.toml"
            )
            assert checked.returncode == 0, checked.stderr


async def test_the_only_key_is_revoked_and_another_follows(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"o{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(5)]
    upstream.add(*items)
    there = {"url": upstream.url}
    with narseal_process(tmp_path, there) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, tmp_path / "storage")
            for item in items:
                await client.get((await client.narinfo(item.hash)).url)
            done = await by_command(tmp_path, "operator-1", "--reason", "lost")
            assert done.returncode == 1
            assert "no key of the operator's is active" in done.stderr
            assert "taken off 5 paths, 0 of them signed anew" in done.stdout
            assert (await client.get(f"{items[0].hash}.narinfo"))[0] == 503
            assert not list((tmp_path / "storage").glob("*.narinfo"))
            write(process, there, signing=only_new(tmp_path))
            logged(process, "is in force")

            async def is_the_new_ones() -> (
                bool
            ):  # an old worker ends its connection with its next answer
                return (await client.get(f"{items[0].hash}.narinfo"))[0] == 200

            await eventually(is_the_new_ones)
            for item in items:
                body = (await client.get(f"{item.hash}.narinfo"))[1]
                assert signers(body) == {"upstream-1", "operator-2"}
            await client.until(lambda: len(in_folder(tmp_path)) == 5)


async def test_an_upstreams_key_is_revoked(tmp_path: Path, upstream: FakeCache) -> None:
    """What only that key spoke for is not served any more; what others speak for is."""
    other = key("upstream-2")
    one = entry("one", b"1", compression="none").signed(UPSTREAM)
    two = entry("two", b"2", compression="none").signed(UPSTREAM, other)
    upstream.add(one, two)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(other.public)]}
    with narseal_process(tmp_path, there, workers=2) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, tmp_path / "storage")
            for item in (one, two):
                await client.narinfo(item.hash)
            done = await by_command(tmp_path, "upstream-1", "--reason", "theirs was stolen")
            assert "withdrawn" in done.stderr, done.stderr
            assert await client.refusal(f"{one.hash}.narinfo") == "unsigned"
            body = (await client.get(f"{two.hash}.narinfo"))[1]
            assert signers(body) == {"upstream-2", "operator-1"}


async def test_a_revoked_key_brings_nothing_back_that_was_withdrawn(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Whatever else carries its signature: only an upstream's narinfo says what a path has to have.

    To take the signature of another pinned key for enough signed what only a revoked bundle's signer
    had spoken for.
    """
    other = key("upstream-2")
    both = entry("both", b"1", compression="zstd").signed(UPSTREAM, other)
    source = addressed("source", b"contents").signed(UPSTREAM)
    upstream.add(both, source)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(other.public)]}
    with narseal_process(tmp_path, there, workers=2) as process:
        async with aiohttp.ClientSession() as session:
            client = Client(process.url, session, tmp_path / "storage")
            for item in (both, source):
                info = await client.narinfo(item.hash)
                assert (await client.get(info.url))[0] == 200
            names = {f"{item.hash}.narinfo" for item in (both, source)}
            await client.until(lambda: names <= client.published())
            upstream.down = True
            for name in ("upstream-1", "operator-1", "upstream-2"):
                done = await by_command(tmp_path, name, "--reason", "stolen")
                assert "0 of them signed anew" in done.stdout, done.stderr
                assert (done.returncode, "admitted on the word" in done.stderr) == (1, True) or (
                    "taken off 0 paths" in done.stdout
                )
                for item in (both, source):
                    assert (await client.get(f"{item.hash}.narinfo"))[0] in (502, 503, 504)
                assert not names & client.published()


async def test_a_rotation_signs_many_at_a_time(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What policy keeps back holds up none of its group, and is not signed."""
    items = [entry(f"g{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(64)]
    kept = entry("kept", b"kept", compression="none").signed(UPSTREAM)
    upstream.add(*items, kept)
    there = {"url": upstream.url}
    async with narseal(tmp_path, there) as client:
        await brought(client, [*items, kept], tmp_path)
    commits = 0
    commit = Engines._commit

    async def counted(engines: Engines, works: list[Any]) -> list[Any]:
        nonlocal commits
        commits += 1
        return await commit(engines, works)

    monkeypatch.setattr(Engines, "_commit", counted)
    before = metric("narseal_resigned_total", result="kept-back")
    signing = both(tmp_path) | {"resign_rate": 1e6}
    rule = {"match": "kept", "action": "deny"}
    async with narseal(tmp_path, there, signing=signing, policy=[rule]) as client:

        async def done() -> bool:
            return bool(json.loads((await client.get("status"))[1])["lackSignatures"] == 1)

        await eventually(done)
        everybody = {"upstream-1", "operator-1", "operator-2"}
        await client.until(lambda: in_folder(tmp_path) == [everybody] * 64)
        await client.until(lambda: metric("narseal_resigned_total", result="kept-back") > before)
    assert commits < 16
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        query = "SELECT ours FROM path WHERE hash_part = ?"
        assert connection.execute(query, [kept.hash]).fetchone() == ("operator-1",)


_ROTATION = """
import asyncio, sys
from pathlib import Path
from narseal.cli.load import load
from narseal.pipeline.substituter import Substituter
from narseal.storage import Epoch

async def main():
    config = load(Path(sys.argv[1]))
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        await substituter.rotation.sign_all(frozenset({"operator-1", "operator-2"}))

asyncio.run(main())
"""


async def test_a_rotation_that_dies_behind_the_index_is_shown_by_the_next(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"d{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(8)]
    upstream.add(*items)
    there = {"url": upstream.url}
    async with narseal(tmp_path, there) as client:
        await brought(client, items, tmp_path)
    signing = both(tmp_path)
    config = tmp_path / "narseal.toml"
    config.write_text(render_toml(settings(tmp_path, there, signing=signing)))
    killed = ["-e", "trace=syncfs", "-e", "inject=syncfs:signal=KILL", "-o", "/dev/null"]
    await asyncio.to_thread(
        subprocess.run, ["strace", "-f", *killed, sys.executable, "-c", _ROTATION, str(config)]
    )
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        query = "SELECT count(*) FROM path WHERE ours LIKE '%operator-2%'"
        assert connection.execute(query).fetchone() == (8,)
    everybody = {"upstream-1", "operator-1", "operator-2"}
    assert everybody not in in_folder(tmp_path)
    async with narseal(tmp_path, there, signing=signing) as client:
        await client.until(lambda: in_folder(tmp_path) == [everybody] * 8)
        await client.until(lambda: not (tmp_path / "index.rotation").exists())


async def test_a_damaged_note_of_a_rotation_is_none(tmp_path: Path) -> None:
    """It ended the upkeep at each start."""
    note = tmp_path / "index.rotation"
    note.write_bytes(b"\xff\xfe\n" + b"0" * 32 + b"\n")
    async with narseal(tmp_path) as client:
        await client.until(lambda: not note.exists())


async def test_a_rotation_holds_what_a_revoked_key_signed_to_its_evidence(tmp_path: Path) -> None:
    """`narseal revoke` broke off behind the revocation, and of an upload nothing but its bytes speaks."""
    good, rotten = (entry(name, name.encode(), compression="none") for name in ("good", "rotten"))
    upload = {"enabled": True, "tokens_file": str(tmp_path / "tokens")}
    token = add(tmp_path)
    async with narseal(tmp_path, upload=upload) as client:
        for item in (good, rotten):
            assert (await Uploader(client, token).path(item))[0] == 201
    (tmp_path / "storage" / rotten.info.url).write_bytes(bytes(len(rotten.file)))
    async with index(tmp_path) as found:
        await found.revocations.add(Revocation("key", OPERATOR.name, "", 0.0, "stolen"))
    # the scrub would find the damage at a moment of its own
    more: dict[str, Any] = {"storage": {"scrub_rate": 0}, "signing": both(tmp_path)}
    async with narseal(tmp_path, upload=upload, **more) as client:

        async def done() -> bool:
            return bool(json.loads((await client.get("status"))[1])["lackSignatures"] == 0)

        await eventually(done)
        assert (await client.get(f"{rotten.hash}.narinfo"))[0] == 404
        assert signers((await client.get(f"{good.hash}.narinfo"))[1]) == {"operator-2"}
        await client.until(lambda: in_folder(tmp_path) == [{"operator-2"}])
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        query = "SELECT withdrawn, signatures FROM path WHERE hash_part = ?"
        withdrawn, signatures = connection.execute(query, [rotten.hash]).fetchone()
        assert withdrawn and "operator-2" not in signatures


async def test_the_status_counts_nothing(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = entry("counted", b"1", compression="none").signed(UPSTREAM)
    upstream.add(item)
    async with narseal(tmp_path, {"url": upstream.url}, signing=both(tmp_path)) as client:
        await client.get((await client.narinfo(item.hash)).url)
        await client.until(lambda: len(in_folder(tmp_path)) == 1)
        surveys: list[str] = []
        survey = Engines.survey

        async def watched(engines: Engines, query: Any) -> Any:
            task = asyncio.current_task()
            if task and task.get_name() != "upkeep":
                surveys.append(str(query))
            return await survey(engines, query)

        monkeypatch.setattr(Engines, "survey", watched)
        tree = json.loads((await client.get("status"))[1])
        assert (tree["paths"], tree["storedBytes"]) == (1, len(item.file))
        for page in ("readyz", "metrics", ""):
            assert (await client.get(page))[0] == 200
        assert surveys == []


async def test_a_repair_writes_what_is_wrong_and_nothing_else(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """With rules, each start wrote every narinfo of the folder anew."""
    items = [entry(f"s{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(8)]
    upstream.add(*items)
    there = {"url": upstream.url}
    async with narseal(tmp_path, there) as client:
        await brought(client, items, tmp_path)
    files = sorted((tmp_path / "storage").glob("*.narinfo"))
    gone, wrong, *right = reversed(files)  # the last ones that are looked at
    gone.unlink()
    wrong.write_bytes(right[0].read_bytes())
    was = [(file.stat().st_ino, file.read_bytes()) for file in right]
    rule = {"match": "nothing", "action": "deny"}
    async with narseal(tmp_path, there, policy=[rule]) as client:
        await client.until(gone.exists)
        await client.until(lambda: wrong.read_bytes() != right[0].read_bytes())
    assert [(file.stat().st_ino, file.read_bytes()) for file in right] == was


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "one of KEY"),
        (["a-1", "--identity", "x"], "one of KEY"),
        (["a-1:AAAA"], "without the part behind the colon"),
        (["--identity", "x"], "needs --issuer and --since"),
        (["--identity", "x", "--issuer", "y", "--since", "yesterday"], "--since"),
        (["--identity", "x", "--issuer", "y", "--since", "2026-01-01"], "needs a time zone"),
        (["--identity", "x", "--issuer", "y", "--since", "2999-01-01T00:00:00Z"], "in the future"),
        (["a-1", "--since", "2026-01-01T00:00:00Z"], "belong to --identity"),
        (["--cosign-key", "/nowhere/cosign.pub"], "/nowhere/cosign.pub"),
    ],
)
def test_what_revoke_says_when_it_is_not_clear(words: list[str], sentence: str) -> None:
    done = narseal_command("revoke", *words, "--reason", "x")
    assert done.returncode == 2
    assert sentence in done.stderr
