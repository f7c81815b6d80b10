"""Every order of two things: what was true when it was weighed is looked at again where it counts.

One operation runs; at each point where it waits for the index, the folder, an upstream or a key, in
turn, another operation is run to its end. Whatever the point, nothing that a later look would not
admit is answered, signed or left in the folder.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from narseal.config import Config
from narseal.cosign import statement
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.cosign.statement import AttestedPath, Subject, render_statement
from narseal.custody import write_private
from narseal.custody.file import FileKey
from narseal.errors import BadUpload, Denied, NotFound, Unavailable, UploadTooLarge
from narseal.nix.cache_info import CacheInfo
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from narseal.pipeline.attest.batches import Attester
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.substituter import Substituter
from narseal.pipeline.upkeep import revocation
from narseal.pipeline.uploads.attestations import Content
from narseal.server.auth import Gate as TokenGate
from narseal.storage import (
    Epoch,
    Folder,
    Index,
    LocalStorage,
    Revocation,
    attestations,
    join,
    join_for_rebuild,
)
from narseal.storage.attestations import Attestations
from narseal.storage.engine import Engines
from narseal.upstream.http import HttpUpstream
from tests.faults.test_uploads import Uploader, add
from tests.tools.cache import Entry, addressed, entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM, Client, narseal, settings
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually

OTHER = key("upstream-2")
SECOND = key("operator-2")
UPLOADER = key("uploader-1")
_MOST = 200
_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


@dataclass
class Gate:
    """Counts the waits of what runs; at one of them, runs something else."""

    at: int = 0
    passed: int = 0
    action: Callable[[], Awaitable[None]] | None = None
    done: bool = field(default=False)
    #: Whose waits count; None: everybody's but the upkeep's.
    only: asyncio.Task[Any] | None = None

    async def __call__(self) -> None:
        task = asyncio.current_task()
        if _INSIDE.get() or self.action is None or (task and task.get_name() == "upkeep"):
            return
        if self.only not in (None, task):
            return
        self.passed += 1
        if self.passed == self.at:
            token = _INSIDE.set(True)
            try:
                await self.action()
                self.done = True
            finally:
                _INSIDE.reset(token)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(revocation, "_SETTLE", 0.0)

    def watch(owner: type, name: str) -> None:
        method = getattr(owner, name)

        async def watched(*args: Any, **options: Any) -> Any:
            await gate()
            result = await method(*args, **options)
            await gate()
            return result

        monkeypatch.setattr(owner, name, watched)

    for name in ("ask", "survey", "write", "write_long"):
        watch(Engines, name)
    for name in (
        "path",
        "nar",
        "paths_of",
    ):  # no waits, but others' processes may write around them
        watch(Index, name)
    watch(HttpUpstream, "get")
    watch(FileKey, "sign")
    watch(Attester, "_run")
    watch(TokenGate, "identify")
    for name in (
        "read",
        "write",
        "write_all",
        "remove",
        "publish",
        "publish_in_group",
        "incoming",
        "link",
    ):
        watch(Folder, name)
    yield gate


@asynccontextmanager
async def command(config: Config) -> AsyncIterator[Substituter]:
    """What a command opens beside a narseal that serves."""
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        yield substituter


def prepare(config: Config) -> None:
    """Its index and its folder, as `narseal serve` makes them."""
    storage = LocalStorage(config.storage.url)
    join(config.storage.index, storage, CacheInfo(config.store_dir))


def revoke(folder: Path, name: str, *upstreams: dict[str, Any], **more: Any) -> Any:
    config = Config(**settings(folder, *upstreams, **more))

    async def action() -> None:
        async with command(config) as substituter:
            await substituter.revoking.revoke(
                Revocation("key", name, "", 0.0, "stolen"), lambda *_: None
            )

    return action


async def everywhere(
    gate: Gate,
    tmp_path: Path,
    act: Callable[[Path, Gate], Awaitable[None]],
) -> None:
    """Run `act` once for each point at which it waits; it sets `gate.action` itself."""
    for at in range(1, _MOST):
        gate.at, gate.passed, gate.action, gate.done, gate.only = at, 0, None, False, None
        await act(tmp_path / str(at), gate)
        if not gate.done:
            assert at > 5, "the gates were not passed"
            return
    pytest.fail(f"more than {_MOST} waits")


def names(body: bytes) -> set[str]:
    return {signature.key_name for signature in NarInfo.parse(body).signatures}


async def check(client: Client, item: Entry, revoked: str, *, speaks: bool) -> None:
    """What a later look finds: `speaks` says whether anything but the revoked key does."""
    status, body, _ = await client.get(f"{item.hash}.narinfo")
    assert status == (200 if speaks else 404), (status, body)
    if status == 200:
        assert revoked not in names(body)
        assert names(body) & {OPERATOR.name, SECOND.name}
    file = client.storage / f"{item.hash}.narinfo"
    if file.exists():
        assert speaks
        assert revoked not in names(file.read_bytes())


@pytest.mark.parametrize("speaks", [False, True])
@pytest.mark.parametrize("content", [False, True])
async def test_revocation_at_each_wait_of_an_admission(
    tmp_path: Path, upstream: FakeCache, gate: Gate, *, speaks: bool, content: bool
) -> None:
    """F2: the path was signed and admitted on a key that was revoked while its NAR was fetched."""
    item = entry("app", b"1", compression="zstd")
    item = item.signed(UPSTREAM, OTHER) if speaks else item.signed(UPSTREAM)
    upstream.add(item)
    there = {
        "url": upstream.url,
        "public_keys": [str(UPSTREAM.public), str(OTHER.public)],
        "sign_when": "content" if content else "evidence",
    }

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            gate.action = revoke(folder, UPSTREAM.name, there)
            status, body, _ = await client.get(f"{item.hash}.narinfo")
            gate.action = None
            if gate.done and status == 200:
                assert speaks, "it was answered on the word of a revoked key"
                assert UPSTREAM.name not in names(body)
            elif gate.done:  # what another key speaks for is answered at once
                assert not speaks, (status, body)
            if gate.done:
                await check(client, item, UPSTREAM.name, speaks=speaks)

    await everywhere(gate, tmp_path, act)


async def test_revocation_leaves_a_content_address_that_was_not_measured(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """Weighed anew, the path rests on its content address: then its bytes come first."""
    item = addressed("tool", b"contents")
    item = item.but(nar_size=item.info.nar_size + 8).signed(UPSTREAM)
    upstream.add(item)
    there = {"url": upstream.url}

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            gate.action = revoke(folder, UPSTREAM.name, there)
            status, _, _ = await client.get(f"{item.hash}.narinfo")
            gate.action = None
            if gate.done:
                assert status != 200, "a size that nobody vouches for was signed"
                await check(client, item, UPSTREAM.name, speaks=False)

    await everywhere(gate, tmp_path, act)


async def test_revocation_of_a_bundles_key_at_each_wait_of_an_admission(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """The path rests on a Sigstore bundle, whose key is revoked meanwhile."""
    cosign = CosignKey.generate()
    item = entry("app", b"1", compression="zstd")
    upstream.add(item)
    assert item.info.file_hash
    said = statement.render([AttestedPath(item.info, "x.nar", item.info.file_hash)])
    bundle = KeySigner(cosign, None, timeout=1).sign_statement(said)
    upstream.files[f"{item.info.url}.sigstore.json"] = bundle
    there = {
        "url": upstream.url,
        "public_keys": [],
        "verify": "bundle",
        "cosign_key": cosign.public.render(),
    }

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        config = Config(**settings(folder, there))
        revocation = Revocation("cosign", cosign.public.hint, "", 0.0, "stolen")

        async def revoke_it() -> None:
            async with command(config) as substituter:
                await substituter.revoking.revoke(
                    revocation, lambda *_: None, cosign_key=cosign.public
                )

        async with narseal(folder, there) as client:
            gate.action = revoke_it
            status, _, _ = await client.get(f"{item.hash}.narinfo")
            gate.action = None
            if gate.done:
                assert status != 200, "it was answered on the word of a revoked key"
                await check(client, item, cosign.public.hint, speaks=False)
        if not gate.done:  # and afterwards
            async with narseal(folder, there) as client:
                await client.narinfo(item.hash)
                await revoke_it()
                await check(client, item, cosign.public.hint, speaks=False)

    await everywhere(gate, tmp_path, act)


async def test_revocation_at_each_wait_of_a_publication(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """A NAR arrives while the key is revoked that its path rests on: the folder does not show it."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    there = {"url": upstream.url}

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            info = await client.narinfo(item.hash)
            gate.action = revoke(folder, UPSTREAM.name, there)
            await client.get(info.url)
            await client.until(lambda: f"{item.hash}.narinfo" in client.published() or gate.done)
        gate.action = None
        async with narseal(folder, there) as client:  # what was under way has ended
            if gate.done:
                await check(client, item, UPSTREAM.name, speaks=False)

    await everywhere(gate, tmp_path, act)


@pytest.mark.parametrize("speaks", [False, True])
async def test_revocation_at_each_wait_of_a_rebuild(
    tmp_path: Path, upstream: FakeCache, gate: Gate, speaks: bool
) -> None:
    """It takes no lock of the folder: what was revoked was written into it once more."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM, *([OTHER] if speaks else []))
    upstream.add(item)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(OTHER.public)]}

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        config = Config(**settings(folder, there))
        async with narseal(folder, there) as client:
            info = await client.narinfo(item.hash)
            assert (await client.get(info.url))[0] == 200
            await client.until(lambda: f"{item.hash}.narinfo" in client.published())
        for file in folder.glob("index.*"):
            file.unlink()
        storage = LocalStorage(config.storage.url)
        join_for_rebuild(config.storage.index, storage, CacheInfo(config.store_dir))
        del storage  # and its lock
        async with command(config) as substituter:
            gate.action = revoke(folder, UPSTREAM.name, there)
            outcome = [error async for _, error in substituter.rebuilding.run()]
            gate.action = None
        assert len(outcome) == 1
        if gate.done:
            file = folder / "storage" / f"{item.hash}.narinfo"
            is_shown = file.exists()
            assert not is_shown or UPSTREAM.name not in names(file.read_bytes())
            upstream.down = True
            async with narseal(folder, there) as client:
                status, body, _ = await client.get(f"{item.hash}.narinfo")
            upstream.down = False
            # our signature may have rested on the key, whenever it was revoked
            assert (status == 200) == is_shown == speaks
            assert not is_shown or UPSTREAM.name not in names(body)

    await everywhere(gate, tmp_path, act)


@pytest.mark.parametrize("kind", ["path", "realisation"])
async def test_revocation_of_ours_at_each_wait_of_a_renewal(
    tmp_path: Path, upstream: FakeCache, gate: Gate, kind: str
) -> None:
    """Both keys sign; one is revoked while an answer is made: it carries the other alone."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    upstream.add(item)
    upstream.files[name] = _trace(name, item)
    there = {"url": upstream.url}
    asked = f"{item.hash}.narinfo" if kind == "path" else name

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        write_private(folder / "second.secret", SECOND.render())
        first = {"url": f"file:{folder}/operator.secret"}
        both = {"key": [first, {"url": f"file:{folder}/second.secret"}]}
        async with narseal(folder, there) as client:
            assert (await client.get(asked))[0] == 200
        async with narseal(folder, there, signing=both) as client:
            gate.action = revoke(folder, OPERATOR.name, there, signing=both)
            status, body, _ = await client.get(asked)
            gate.action = None
            for _ in range(2):
                if gate.done and status == 200:
                    assert OPERATOR.name.encode() + b":" not in body, body
                    assert f'"{OPERATOR.name}"'.encode() not in body
                status, body, _ = await client.get(asked)
            assert not gate.done or status == 200

    await everywhere(gate, tmp_path, act)


@pytest.mark.parametrize("name", [OPERATOR.name, UPSTREAM.name])
async def test_revocation_at_each_wait_of_a_rotation(
    tmp_path: Path, upstream: FakeCache, gate: Gate, name: str
) -> None:
    """Many are signed at a time: what they were judged by is looked at again where they are written."""
    items = [entry(f"app-{n}", b"%d" % n, compression="zstd").signed(UPSTREAM) for n in range(2)]
    kept = entry("kept", b"kept", compression="zstd").signed(OTHER)
    upstream.add(*items, kept)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(OTHER.public)]}

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        async with narseal(folder, there) as client:
            for item in (*items, kept):
                assert (await client.get((await client.narinfo(item.hash)).url))[0] == 200
            await client.until(lambda: len(list((folder / "storage").glob("*.narinfo"))) == 3)
        write_private(folder / "second.secret", SECOND.render())
        urls = [f"file:{folder}/operator.secret", f"file:{folder}/second.secret"]
        both = {"key": [{"url": url} for url in urls], "resign_rate": 1e6}
        async with command(Config(**settings(folder, there, signing=both))) as substituter:
            rotation = substituter.rotation
            gate.action = revoke(folder, name, there, signing=both)
            with suppress(Unavailable):
                await rotation.sign_all(frozenset({OPERATOR.name, SECOND.name}))
            gate.action = None
            if gate.done:
                await rotation.sign_all(frozenset({SECOND.name}))
            index = substituter.services.index
            for item in (*items, kept):
                admitted = await index.path(item.hash)
                assert admitted
                path = admitted[0]
                file = folder / "storage" / f"{item.hash}.narinfo"
                signers = {signature.key_name for signature in path.signatures}
                revoked = gate.done and name == UPSTREAM.name and item is not kept
                assert (path.withdrawn, file.exists()) == (revoked, not revoked)
                if not revoked:
                    assert SECOND.name in signers & names(file.read_bytes())
                if gate.done:
                    assert name not in signers | (
                        names(file.read_bytes()) if not revoked else set()
                    )

    await everywhere(gate, tmp_path, act)


def _trace(name: str, item: Entry) -> bytes:
    from narseal.nix.realisation import parse_at

    bare = f'{{"outPath":"{item.info.store_path}","signatures":[]}}'.encode()
    parsed = parse_at(name, bare)
    return parsed.with_signatures((UPSTREAM.sign(parsed.fingerprint()),)).render()


async def test_revocation_at_each_wait_of_a_realisation(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """F4: a realisation lives the life of a path, also after it was signed anew."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    name = f"build-trace-v2/{store_path('app.drv')}/out.doi"
    upstream.add(item)
    upstream.files[name] = _trace(name, item)
    there = {"url": upstream.url}

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            gate.action = revoke(folder, UPSTREAM.name, there)
            status, _, _ = await client.get(name)
            gate.action = None
            if gate.done:
                assert status != 200
                assert (await client.get(name))[0] == 404

    await everywhere(gate, tmp_path, act)


async def test_revocation_at_each_wait_of_an_upload(tmp_path: Path, gate: Gate) -> None:
    """The uploader's key is revoked while what it signed is taken; the token covers nothing."""
    item = entry("app", b"1", compression="zstd").signed(UPLOADER)

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        token = add(folder, "nothing-*")
        upload = {
            "enabled": True,
            "tokens_file": str(folder / "tokens"),
            "trusted_keys": [str(UPLOADER.public)],
        }
        async with narseal(folder, upload=upload) as client:
            uploader = Uploader(client, token)
            assert (await uploader.put(item.info.url, item.file))[0] == 201
            gate.action = revoke(folder, UPLOADER.name, upload=upload)
            status, text = await uploader.put(f"{item.hash}.narinfo", item.info.render())
            gate.action = None
            if gate.done:
                assert status in (201, 403), text
                await check(client, item, UPLOADER.name, speaks=False)

    await everywhere(gate, tmp_path, act)


async def test_an_admission_at_each_wait_of_a_revocation(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """The other way round: somebody asks for a path at each moment of the revocation."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    there = {"url": upstream.url}

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            info = await client.narinfo(item.hash)
            await client.get(info.url)
            await client.until(lambda: f"{item.hash}.narinfo" in client.published())

            async def ask() -> None:
                await client.get(f"{item.hash}.narinfo")
                await client.get(info.url)

            gate.action = ask
            await revoke(folder, UPSTREAM.name, there)()
            gate.action = None
            await check(client, item, UPSTREAM.name, speaks=False)

    await everywhere(gate, tmp_path, act)


async def test_a_publication_at_each_wait_of_a_revocation(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """Another key speaks for the path, so it stays; its file never shows the revoked key's signature."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM, OTHER)
    upstream.add(item)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(OTHER.public)]}

    async def act(folder: Path, gate: Gate) -> None:
        async with narseal(folder, there) as client:
            info = await client.narinfo(item.hash)
            status = json.loads((await client.get(f"status/{item.info.store_path}"))[1])
            rests_on = status["evidence"].removeprefix("signature ")
            [revoked] = {UPSTREAM.name, OTHER.name} - {rests_on}
            file = client.storage / f"{item.hash}.narinfo"

            async def publish() -> None:
                is_revoked = json.loads((await client.get("keys"))[1])["revoked"] != []
                assert (await client.get(info.url))[0] == 200
                await client.until(file.exists)
                if is_revoked:
                    assert revoked not in names(file.read_bytes())

            gate.action = publish
            await revoke(folder, revoked, there)()
            gate.action = None
            await check(client, item, revoked, speaks=True)

    await everywhere(gate, tmp_path, act)


async def test_changed_rules_at_each_wait_of_a_publication(
    tmp_path: Path, upstream: FakeCache, gate: Gate
) -> None:
    """New workers with other rules begin while an old one fetches: the folder follows the new ones."""
    item = entry("app", b"1", compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    there = {"url": upstream.url}
    denied = {"policy": [{"match": ["app"], "action": "deny"}]}

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        config = Config(**settings(folder, there))
        newer = Config(**settings(folder, there, **denied))
        async with narseal(folder, there):
            pass  # makes the index and the folder
        file = folder / "storage" / f"{item.hash}.narinfo"
        epoch = Epoch.of(config.storage.index)
        async with Substituter.opened(newer, epoch=epoch, serving=False) as new:
            async with Substituter.opened(config, epoch=epoch, serving=False) as old:
                await old.everything.narinfo(item.hash)

                async def reload() -> None:
                    old.give_way()
                    await new.repair.look_after_all()

                gate.action = reload
                reader = await old.everything.nars.get(item.info.url.removeprefix("nar/"))
                reader.close()
            gate.action = None  # what the old one had begun has ended
            await new.repair.look_after_all()
            if gate.done:
                assert not file.exists()

    await everywhere(gate, tmp_path, act)


def covered(folder: Path) -> list[str]:
    """The paths that a bundle of ours is recorded to cover."""
    with closing(sqlite3.connect(folder / "index.sqlite")) as index:
        return [str(row[0]) for row in index.execute("SELECT hash_part FROM attested")]


@pytest.mark.parametrize(
    "what", ["its key", "its file", "the cosign key", "an attestation", "the rules"]
)
async def test_what_is_signed_with_sigstore_is_decided_again_when_it_is_recorded(
    tmp_path: Path, upstream: FakeCache, gate: Gate, what: str
) -> None:
    """A batch of two is signed; at each wait, what one of them rests on goes away."""
    gone = entry("gone-app-1", b"gone", compression="zstd").signed(UPSTREAM)
    kept = entry("kept-1", b"kept", compression="zstd").signed(OTHER)
    upstream.add(gone, kept)
    there = {"url": upstream.url, "public_keys": [str(UPSTREAM.public), str(OTHER.public)]}
    cosign, attester = CosignKey.generate(), CosignKey.generate()
    subject = Subject(f"/nix/store/{gone.info.store_path}", gone.info.nar_hash.digest)
    attested = KeySigner(attester, None, timeout=1).sign_statement(
        render_statement([subject], "https://example.org/built/v1", {})
    )
    rule = {"match": ["gone-*"], "require": "attestation", "cosign_key": attester.public.render()}
    rules = [rule] if what == "an attestation" else []

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        file = folder / "cosign.key"
        write_private(file, cosign.render(b""))
        section = {"mode": "key", "key": f"file:{file}", "batch_max_age": "0s", "per_file": "yes"}
        more = {"cosign": section, "policy": rules}
        config = Config(**settings(folder, there, **more))
        prepare(config)
        before: list[str] | None = None
        async with command(config) as substituter:
            if rules:
                assert await substituter.provenance.put(Content.of(subject.digest), attested)
            for item in (gone, kept):
                await substituter.everything.narinfo(item.hash)
                reader = await substituter.everything.nars.get(item.info.url.removeprefix("nar/"))
                if isinstance(reader, Reader):
                    await reader.whole()
                reader.close()
            is_retired = False
            waiting = substituter.services.index.attestations

            async def both_wait() -> bool:
                return len(await waiting.oldest(9)) == 2

            await eventually(both_wait)

            async def withdraw() -> None:
                nonlocal before, is_retired
                before = covered(folder)
                async with command(config) as beside:
                    if what == "its key":
                        revocation = Revocation("key", UPSTREAM.name, "", 0.0, "stolen")
                        await beside.revoking.revoke(revocation, lambda *_: None)
                    elif what == "its file":
                        await beside.services.index.withdraw(gone.info.url.removeprefix("nar/"))
                    elif what == "the rules":
                        is_retired = True
                    else:
                        key = cosign if what == "the cosign key" else attester
                        hint = key.public.hint
                        await beside.revoking.revoke(
                            Revocation("cosign", hint, "", 0.0, "stolen"),
                            lambda *_: None,
                            cosign_key=key.public,
                        )

            signing = Attester(substituter.services, lambda: not is_retired)
            gate.action, gate.only = withdraw, asyncio.current_task()
            for _ in range(6):
                with suppress(Unavailable if what == "the cosign key" else ZeroDivisionError):
                    await signing._step()
                if signing._begun is None and not (await waiting.queue())[0]:
                    break
            gate.action = None
            signing._thread.shutdown()
            now = set(covered(folder))
            if before is None:
                assert now == {gone.hash, kept.hash}
            elif what in ("its key", "its file", "an attestation"):
                assert (gone.hash in now) == (gone.hash in before), "recorded, though withdrawn"
                assert kept.hash in now
                name = gone.info.url.removeprefix("nar/")
                for question in (
                    substituter.signatures.bundle_of(name),
                    substituter.signatures.signature_of(name),
                    substituter.signatures.attestations_of(gone.info.nar_hash),
                    substituter.signatures.attestations_of_path(gone.info.store_path),
                ):
                    with pytest.raises((NotFound, Denied)):
                        await question
            elif what == "the rules":
                assert now == set(before), "recorded under rules that are not in force"
            else:
                assert not now, "recorded though its key is revoked"
                assert not list((folder / "storage").glob("attestations/*"))
                assert signing._begun is None or signing._begun.bundle is None, "tried for ever"

    await everywhere(gate, tmp_path, act)


async def test_a_path_that_may_pass_while_it_is_judged_waits_on(
    tmp_path: Path, upstream: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attestation gets a time, the attester looks at its clock and at the rules, it is committed."""
    item = entry("app-1", b"app", compression="zstd").signed(UPSTREAM)
    upstream.add(item)
    attester = CosignKey.generate()
    subject = Subject(f"/nix/store/{item.info.store_path}", item.info.nar_hash.digest)
    bundle = KeySigner(attester, None, timeout=1).sign_statement(
        render_statement([subject], "https://example.org/built/v1", {})
    )
    rule = {"match": ["app-*"], "require": "attestation", "cosign_key": attester.public.render()}
    write_private(tmp_path / "cosign.key", CosignKey.generate().render(b""))
    cosign = {"mode": "key", "key": f"file:{tmp_path}/cosign.key", "batch_max_age": "0s"}
    there = {"url": upstream.url}
    async with narseal(tmp_path, there):
        pass  # makes the index and the folder
    config = Config(**settings(tmp_path, there, cosign=cosign))
    async with command(config) as substituter:
        await substituter.everything.narinfo(item.hash)
        reader = await substituter.everything.nars.get(item.info.url.removeprefix("nar/"))
        if isinstance(reader, Reader):
            await reader.whole()
        reader.close()

    config = Config(**settings(tmp_path, there, cosign=cosign, policy=[rule]))
    async with command(config) as substituter, command(config) as beside:
        waiting = substituter.services.index.attestations

        async def waits() -> bool:
            return (await waiting.queue())[0] == 1

        await eventually(waits)
        loop, timed, committed = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        enqueue, drop = attestations.enqueue, Attestations.drop

        def slowly(connection: Connection, files: Sequence[str]) -> None:
            enqueue(connection, files)
            loop.call_soon_threadsafe(timed.set)
            assert committed.wait(PATIENCE)

        async def at_last(self: Attestations, *judged: Any) -> None:
            if not committed.is_set():
                committed.set()
                assert await bringing
            await drop(self, *judged)

        monkeypatch.setattr(attestations, "enqueue", slowly)
        monkeypatch.setattr(Attestations, "drop", at_last)
        bringing = asyncio.create_task(beside.provenance.put(Content.of(subject.digest), bundle))
        await timed.wait()
        signing = Attester(substituter.services, lambda: True)
        for _ in range(4):
            await signing._step()
        signing._thread.shutdown()
        assert committed.is_set()
        assert covered(tmp_path) == [item.hash]


async def test_revocation_at_each_wait_of_an_attestation(tmp_path: Path, gate: Gate) -> None:
    """Somebody brings a bundle while its key is revoked: those that are dropped were listed before."""
    attester = CosignKey.generate()
    subject = Subject("app", bytes(32))
    bundle = KeySigner(attester, None, timeout=1).sign_statement(
        render_statement([subject], "https://example.org/built/v1", {})
    )
    accept = {"attestations": {"accept": [{"cosign_key": attester.public.render()}]}}
    revocation = Revocation("cosign", attester.public.hint, "", 0.0, "stolen")

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        config = Config(**settings(folder, **accept))
        prepare(config)
        async with command(config) as substituter:

            async def revoke_it() -> None:
                async with command(config) as beside:
                    await beside.revoking.revoke(
                        revocation, lambda *_: None, cosign_key=attester.public
                    )

            gate.action = revoke_it
            with suppress(BadUpload):
                await substituter.provenance.put(Content.of(subject.digest), bundle)
            gate.action = None
            if gate.done:
                with pytest.raises(NotFound):
                    await substituter.signatures.attestations_of(Hash("sha256", subject.digest))
                assert not list((folder / "storage").glob("attestations/*"))

    await everywhere(gate, tmp_path, act)


@pytest.mark.parametrize("first", ["who fails", "who is taken"])
async def test_an_attestation_that_is_brought_twice_has_its_file(
    tmp_path: Path, gate: Gate, first: str
) -> None:
    """Workers with the rules of before take one of a digest, those that come take two."""
    attester = CosignKey.generate()
    subject = Subject("app", bytes(32))
    older, bundle = (
        KeySigner(attester, None, timeout=1).sign_statement(
            render_statement([subject], f"https://example.org/{kind}/v1", {})
        )
        for kind in ("built", "tested")
    )
    accept = {"accept": [{"cosign_key": attester.public.render()}]}

    async def act(folder: Path, gate: Gate) -> None:
        folder.mkdir(parents=True)
        before, after = (
            Config(**settings(folder, attestations=accept | {"per_digest": most}))
            for most in (1, 2)
        )
        prepare(before)
        async with command(before) as bringing:
            assert await bringing.provenance.put(Content.of(subject.digest), older)
        async with command(before) as failing, command(after) as taking:

            async def fail() -> None:
                with suppress(UploadTooLarge):
                    assert not await failing.provenance.put(Content.of(subject.digest), bundle)

            async def take() -> None:
                assert await taking.provenance.put(Content.of(subject.digest), bundle)

            one, other = (fail, take) if first == "who fails" else (take, fail)
            gate.action = other
            await one()
            gate.action = None
            if first == "who is taken" or gate.done:
                found = await taking.signatures.attestations_of(Hash("sha256", subject.digest))
                assert len(found) == 2

    await everywhere(gate, tmp_path, act)
