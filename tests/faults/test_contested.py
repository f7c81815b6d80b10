"""Several who claim the same thing: a NAR's names, a path's side files, room to wait, signatures."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from narseal.storage import waiting
from tests.faults.test_oidc import issuer
from tests.faults.test_rule import scoped
from tests.faults.test_uploads import ITEM, OTHER, Uploader, uploading
from tests.tools.cache import entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM, narseal
from tests.tools.sigstore.issuer import Issuer
from tests.tools.upstream import FakeCache

__all__ = ["issuer"]

MINE = b'{"version":1,"root":{"type":"regular","size":1}}'
SQUAT = b'{"version":1,"root":{"type":"regular","size":2}}'


async def test_a_nar_both_of_whose_names_are_claimed_gets_another(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """Two narinfos of an upstream took the names of a NAR's file and content: it was a conflict."""
    claims = []
    for number, claimed in enumerate((ITEM.info.file_hash, ITEM.info.nar_hash)):
        assert claimed
        lie = entry(f"lie-{number}", b"%d" % number, compression="zstd").signed(UPSTREAM)
        url = f"nar/{claimed.nix32}.nar.zst"
        claims.append(lie.but(file_hash=claimed, file_size=len(ITEM.file), url=url))
    upstream.add(*claims)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        client = uploader.client
        taken = [(await client.narinfo(lie.hash)).url for lie in claims]
        assert taken == [lie.info.url for lie in claims]
        assert await uploader.path(ITEM) == (201, "")
        info = await client.narinfo(ITEM.hash)
        assert info.url not in taken
        assert (await client.get(info.url))[1] == ITEM.file
        for lie in claims:  # whose names they are
            assert (await client.get(lie.info.url))[1] == lie.file
        # it is found under its third name by who brings the same NAR for another path
        again = entry("copy-1", b"uploaded", compression="zstd")
        assert again.info.nar_hash == ITEM.info.nar_hash
        assert await uploader.path(again) == (201, "")
        copy = await client.narinfo(again.hash)
        assert (await client.get(copy.url))[1] == ITEM.file


async def test_two_uploaders_of_one_rule_are_each_their_own_owner(
    tmp_path: Path, issuer: Issuer
) -> None:
    """Both are of the issuer and in the scope; what the other left beside a path was published."""
    rule = {
        "issuer": issuer.url, "audience": "narseal", "claims": {"repository": "example/app"},
        "allow": ["my-app-*"],
    }  # fmt: skip
    async with narseal(tmp_path, upload={"enabled": True, "oidc": [rule]}) as client:

        def bearing(branch: str) -> Uploader:
            subject = f"repo:example/app:ref:refs/heads/{branch}"
            token = issuer.token(subject, aud="narseal", repository="example/app")
            return Uploader(client, token)

        builder, stranger = bearing("main"), bearing("evil")
        name = f"{ITEM.hash}.ls"
        assert (await builder.put(name, MINE))[0] == 201
        assert (await stranger.put(name, SQUAT))[0] == 201
        assert await bearing("main").path(ITEM) == (201, "")  # another token of the same subject
        assert (await client.get(name))[1] == MINE


async def test_what_a_trusted_key_let_in_brings_no_side_files_along(tmp_path: Path) -> None:
    """The key speaks for the path alone; its token covers neither listing nor debug info of it."""
    builder = key("builder-1")
    name = f"{OTHER.hash}.ls"
    async with uploading(tmp_path, trusted_keys=[str(builder.public)]) as everything:
        narrow = await scoped(tmp_path, everything, "nothing-*")
        assert (await narrow.put(name, SQUAT))[0] == 201  # it waits
        assert await narrow.path(OTHER.signed(builder)) == (201, "")
        assert (await narrow.client.get(f"{OTHER.hash}.narinfo"))[0] == 200
        assert (await narrow.client.get(name))[0] == 404
        assert name not in narrow.client.published()
        assert (await narrow.put(name, SQUAT))[0] == 403
        assert (await everything.put(name, MINE))[0] == 201
        assert (await narrow.client.get(name))[1] == MINE


async def test_who_lets_too_many_files_wait_takes_nobody_elses_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_MOST", 3)
    async with uploading(tmp_path) as owner:
        greedy = await scoped(tmp_path, owner, "*-app-*")

        async def leave(uploader: Uploader, number: int) -> int:
            name = f"{store_path(f'path-{number}').hash_part}.ls"
            return (await uploader.put(name, MINE))[0]

        assert [await leave(greedy, number) for number in range(5)] == [201, 201, 201, 507, 507]
        status, text = await greedy.put(f"{store_path('another').hash_part}.ls", MINE)
        assert (status, "too many of your files wait" in text) == (507, True)
        name = f"{ITEM.hash}.ls"
        assert (await owner.put(name, MINE))[0] == 201
        assert await owner.path(ITEM) == (201, "")
        assert (await owner.client.get(name))[1] == MINE


async def test_who_is_told_that_his_signatures_were_taken_finds_them(tmp_path: Path) -> None:
    """Each brings what would fit alone; all of them together do not."""
    groups = [[key(f"crowd-{group}-{n}") for n in range(10)] for group in range(6)]
    async with uploading(tmp_path) as everything:
        uploaders = [await scoped(tmp_path, everything, "my-app-*") for _ in groups]
        assert await everything.path(ITEM) == (201, "")

        async def sign(uploader: Uploader, keys: list[Any]) -> int:
            text = ITEM.signed(*keys).info.render()
            return (await uploader.put(f"{ITEM.hash}.narinfo", text))[0]

        answers = await asyncio.gather(*map(sign, uploaders, groups))
        found = {s.key_name for s in (await everything.client.narinfo(ITEM.hash)).signatures}
        assert sorted(answers) == [200, 200, 422, 422, 422, 422]
        assert len(found) == 21 and OPERATOR.name in found
        for answer, keys in zip(answers, groups, strict=True):
            names = {secret.name for secret in keys}
            assert found & names == (names if answer == 200 else set())
