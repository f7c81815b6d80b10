"""Content that names its own path: what an upstream can put where the name stood."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import aiohttp
import pytest

from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from tests.tools.cache import Entry, entry
from tests.tools.narseal import UPSTREAM, is_countersigned, narseal_process
from tests.tools.upstream import fake_cache

_MARK = b"e" * 32


def _node(own: bytes, other: bytes) -> nar.Directory:
    return nar.Directory({
        b"bin": nar.Directory({b"run": nar.Regular(b"#!" + own + b"/sh\n", executable=True)}),
        b"etc": nar.Regular(b"prefix=" + other),
    })  # fmt: skip


def _addressed(*, with_places: bool) -> tuple[Entry, list[Entry]]:
    """A path that names itself twice, and others of the same CA but for what was blanked."""
    marked = b"".join(nar.render(_node(_MARK, _MARK)))
    hashed = marked.replace(_MARK, bytes(32))
    if with_places:
        at = [marked.find(_MARK), marked.rfind(_MARK)]
        hashed += b"".join(b"|%d" % place for place in at)
    ca = ContentAddress(Method.NAR, Hash("sha256", hashlib.sha256(hashed).digest()))
    me = entry("self", node=_node(b"", b"")).info.store_path
    path = ca.store_path("self", (me,), self_hash=me.hash_part, store_dir="/nix/store")
    assert path
    own, blank = path.hash_part.encode(), bytes(32)
    found = [
        entry("self", node=_node(*parts), ca=ca, path=path, references=(path,))
        for parts in ((own, own), (blank, blank), (own, blank), (blank, own))
    ]
    return found[0], found[1:]


async def _ask(url: str, item: Entry) -> NarInfo | int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/{item.hash}.narinfo") as got:
        return NarInfo.parse(await got.read()) if got.status == 200 else got.status


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("with_places", [False, True])
def test_what_stood_for_itself_cannot_be_blanked(
    tmp_path: Path, which: int, with_places: bool
) -> None:
    async def run() -> None:
        honest, blanked = _addressed(with_places=with_places)
        async with fake_cache() as hostile, fake_cache() as good:
            hostile.add(blanked[which])
            good.add(honest.signed(UPSTREAM))
            pinned = [str(UPSTREAM.public)]
            first = {"url": hostile.url, "priority": 10, "public_keys": pinned}
            with narseal_process(tmp_path, first, {"url": good.url}) as process:
                got = await _ask(process.url, honest)
                assert isinstance(got, NarInfo)
                assert is_countersigned(got)
                assert got.nar_hash == honest.info.nar_hash

    asyncio.run(run())


@pytest.mark.parametrize("with_places", [False, True])
def test_a_self_reference_is_evidence_only_with_its_places(
    tmp_path: Path, with_places: bool
) -> None:
    async def run() -> None:
        honest, _ = _addressed(with_places=with_places)
        async with fake_cache() as cache:
            cache.add(honest)
            with narseal_process(tmp_path, {"url": cache.url}) as process:
                got = await _ask(process.url, honest)
                assert isinstance(got, NarInfo) == with_places
                assert with_places or got == 404

    asyncio.run(run())


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
def test_a_hash_for_which_collisions_are_made_is_no_evidence(
    tmp_path: Path, algorithm: str
) -> None:
    async def run() -> None:
        node = nar.Regular(b"contents")
        digest = hashlib.new(algorithm, b"contents").digest()
        ca = ContentAddress(Method.FLAT, Hash(algorithm, digest))
        path = ca.store_path("flat", (), self_hash="", store_dir="/nix/store")
        assert path
        item = entry("flat", node=node, ca=ca, path=path)
        async with fake_cache() as cache:
            cache.add(item)
            with narseal_process(tmp_path, {"url": cache.url}) as process:
                got = await _ask(process.url, item)
                assert isinstance(got, NarInfo) == algorithm.startswith(("sha2", "sha5"))

    asyncio.run(run())
