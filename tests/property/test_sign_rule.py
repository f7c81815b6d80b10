"""The sign rule: whatever is offered, by whom, and in which order, each signed answer has its evidence.

Honest and false narinfos come from an upstream and from an uploader, one after the other, so that
the later ones meet what is stored already. For each answer that carries the operator's signature,
a checker of the tests' own (tests/tools/checker.py) finds one trusted signature over all of it, or
measures every part on the bytes that are served.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narseal.custody import tokens
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keys import SecretKey, Signature
from tests.faults.test_uploads import Uploader
from tests.tools import checker
from tests.tools.cache import Entry, entry, key, store_path, unzstd
from tests.tools.checker import Answer, Trust
from tests.tools.narseal import OPERATOR, UPSTREAM, Client, narseal
from tests.tools.upstream import FakeCache, fake_cache

STRANGER, UPLOADER = key("stranger-1"), key("uploader-1")
KEYS = (UPSTREAM, STRANGER, UPLOADER, OPERATOR)
DEPENDENCY = entry("mine-dependency", b"dependency", compression="none")
EMPTY = store_path("nobody-has-it")
CONTENTS = (b"one", b"two", DEPENDENCY.info.store_path.full("/nix/store").encode())

#: What a liar changes: a name, and whether his keys sign the lie or what was before it.
LIES = ("none", "size", "hash", "reference", "path", "foreign bytes", "foreign CA", "forged")
ADDRESSES = (
    None, None, (Method.NAR, "sha256"), (Method.FLAT, "sha256"), (Method.TEXT, "sha256"),
    (Method.NAR, "sha512"), (Method.FLAT, "sha1"), (Method.GIT, "sha1"),
)  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """A path as somebody offers it."""

    item: Entry
    by_upload: bool
    #: Nothing of it is false, and it is what its CA says.
    is_honest: bool
    signers: frozenset[str]

    @property
    def hash(self) -> str:
        return self.item.hash


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    """One offer; its name is of the token's scope (`mine-*`), or not."""
    name = draw(st.sampled_from(["mine-a", "mine-b", "mine", "other-a", "other-mine-a"]))
    contents = draw(st.sampled_from(CONTENTS))
    nodes: list[nar.Node] = [nar.Regular(contents), nar.Regular(contents, executable=True),
                                 nar.Directory({b"a": nar.Regular(contents)})]  # fmt: skip
    node = draw(st.sampled_from(nodes))
    refers = draw(st.booleans())
    references = (DEPENDENCY.info.store_path,) if refers else ()
    item, is_honest = _addressed(draw, name, node, references)
    lie = draw(st.sampled_from(LIES)) if draw(st.booleans()) else "none"
    signers = draw(st.sets(st.sampled_from(KEYS), max_size=2))
    before = draw(st.booleans())
    changed = _changed(item, lie)
    if lie == "forged":
        signed = changed.but(signatures=tuple(Signature(k.name, bytes(64)) for k in signers))
    elif before:
        signatures = item.signed(*signers).info.signatures
        signed = changed.but(signatures=signatures)
    else:
        signed = changed.signed(*signers)
    is_honest = is_honest and lie == "none" and (not refers or contents == CONTENTS[2])
    return Offer(signed, draw(st.booleans()), is_honest, frozenset(k.name for k in signers))


def _addressed(
    draw: st.DrawFn, name: str, node: nar.Node, references: tuple[Any, ...]
) -> tuple[Entry, bool]:
    """A path with a CA of one of Nix's kinds, or none; and whether it is as the CA says."""
    compression = draw(st.sampled_from(["none", "zstd"]))
    kind = draw(st.sampled_from(ADDRESSES))
    plain = b"".join(nar.render(node))
    if kind is None:
        place = store_path(f"{name}")
        made = entry(name, node=node, compression=compression, references=references)
        return made.but(store_path=place), True
    method, algorithm = kind
    hashed = plain if method is Method.NAR or not isinstance(node, nar.Regular) else node.contents
    ca = ContentAddress(method, Hash(algorithm, hashlib.new(algorithm, hashed).digest()))
    path = ca.store_path(name, references, self_hash="", store_dir="/nix/store")
    if path is None:  # Nix has none with references: a path that the CA does not give
        path = store_path(name)
    made = entry(name, node=node, compression=compression, references=references, ca=ca, path=path)
    is_file = isinstance(node, nar.Regular) and not node.executable
    gives = ca.store_path(name, references, self_hash="", store_dir="/nix/store") is not None
    return made, gives and (method is Method.NAR or (method is not Method.GIT and is_file))


def _changed(item: Entry, lie: str) -> Entry:
    if lie == "size":
        return item.but(nar_size=item.info.nar_size + 8)
    if lie == "hash":
        return item.but(nar_hash=Hash.sha256(b"another"))
    if lie == "reference":
        return item.but(references=tuple({*item.info.references, DEPENDENCY.info.store_path}))
    if lie == "path":
        return item.but(store_path=store_path(f"{item.info.store_path.name}-else"))
    if lie == "foreign CA":
        return item.but(ca=ContentAddress(Method.FLAT, Hash.sha256(b"another")))
    if lie == "foreign bytes":
        other = entry("other", b"foreign", compression=item.info.compression)
        return replace(item, file=other.file)
    return item


@dataclass(frozen=True)
class World:
    """How the operator set narseal up."""

    verify: str
    sign_when: str
    references: str
    offers: list[Offer]


worlds = st.builds(
    World,
    verify=st.sampled_from(["signature", "signature", "content"]),
    sign_when=st.sampled_from(["evidence", "content"]),
    references=st.sampled_from(["warn", "refuse"]),
    offers=st.lists(offers(), min_size=2, max_size=7),
)


def trust_of(world: World, mine: list[Offer]) -> Trust:
    """What speaks for a path that came by these offers, in the checker's terms."""
    uploaded = any(offer.by_upload for offer in mine)
    pulled = any(not offer.by_upload for offer in mine)
    keys: list[SecretKey] = []
    if pulled and world.verify == "signature":
        keys.append(UPSTREAM)
    if uploaded:
        keys.append(UPLOADER)
    name = mine[0].item.info.store_path.name
    in_scope = uploaded and (name.startswith("mine-"))
    content = pulled and world.verify == "content"
    return Trust(
        tuple((k.name, k.public.data) for k in keys),
        is_named=in_scope or content,
        may_lack_references=uploaded and world.references == "warn",
    )


SEEN: Counter[str] = Counter()


async def check(world: World, client: Client, hash_part: str, mine: list[Offer]) -> None:
    """Hold what is answered, and what the folder shows, to the evidence."""
    status, body, _ = await client.get(f"{hash_part}.narinfo")
    texts = [body] if status == 200 else []
    file = client.storage / f"{hash_part}.narinfo"
    if file.exists():
        texts.append(file.read_bytes())
    for text in texts:
        answer = Answer.read(text)
        ours = [s for s in answer.signatures if s[0] == OPERATOR.name]
        assert ours, text
        key_of_ours = (OPERATOR.name, OPERATOR.public.data)
        for signature in ours:
            assert replace(answer, signatures=(signature,)).is_signed_by([key_of_ours]), text
        data = await _nar(client, answer)
        trust = trust_of(world, mine)
        assert (wrong := checker.problem(answer, data, trust)) is None, f"{wrong}\n{text.decode()}"
        SEEN["signed"] += 1
        SEEN["by signature" if answer.is_signed_by(trust.keys) else "by bytes"] += 1
        SEEN["addressed"] += "CA" in answer.fields


async def _nar(client: Client, answer: Answer) -> bytes | None:
    try:
        status, data, _ = await client.get(answer.fields["URL"])
    except Exception:  # a body that ends badly is none
        return None
    if status != 200:
        return None
    return unzstd(data) if answer.fields["Compression"] == "zstd" else data


def must_be_signed(world: World, offer: Offer) -> bool:
    """Whether narseal owes a signature to a path that only this offer is of."""
    if not offer.is_honest:
        return False
    by, info = offer.signers, offer.item.info
    if offer.by_upload:
        return UPLOADER.name in by or info.store_path.name.startswith("mine-")
    # for the other hashes collisions are made: such an address is no evidence
    is_addressed = info.ca is not None and info.ca.hash.algorithm in ("sha256", "sha512")
    return world.verify == "content" or UPSTREAM.name in by or is_addressed


async def live(world: World, folder: Path, cache: FakeCache) -> None:
    token = tokens.add(folder / "tokens", "ci", allow=("mine-*",), expires=None)[1]
    upload = {
        "enabled": True,
        "tokens_file": str(folder / "tokens"),
        "trusted_keys": [str(UPLOADER.public)],
        "references": world.references,
    }
    keys = [str(UPSTREAM.public)] if world.verify == "signature" else []
    there = {"url": cache.url, "verify": world.verify, "public_keys": keys}
    there |= {"sign_when": world.sign_when} if world.verify == "signature" else {}
    async with narseal(folder, there, upload=upload) as client:
        uploader = Uploader(client, token)
        assert (await uploader.path(DEPENDENCY))[0] == 201
        by_hash: dict[str, list[Offer]] = {}
        for offer in world.offers:
            mine = by_hash.setdefault(offer.hash, [])
            mine.append(offer)
            item = offer.item
            if offer.by_upload:
                await uploader.put(item.info.url, item.file)
                await uploader.put(f"{item.hash}.narinfo", item.info.render())
            else:
                cache.files |= item.files()
            await check(world, client, offer.hash, mine)
            SEEN["offers"] += 1
            alone = len(mine) == 1 and not _shares_a_file(world, offer)
            if alone and must_be_signed(world, offer):
                assert (await client.get(f"{offer.hash}.narinfo"))[0] == 200, item.info
                SEEN["owed"] += 1
        for hash_part, mine in by_hash.items():  # with all that is stored by now
            await check(world, client, hash_part, mine)


def _shares_a_file(world: World, offer: Offer) -> bool:
    """Whether another offer's lie stands at this one's address in the upstream."""
    return any(o is not offer and o.item.info.url == offer.item.info.url for o in world.offers)


@pytest.fixture(scope="module", autouse=True)
def _not_vacuous() -> Iterator[None]:
    yield
    for what in ("signed", "by signature", "by bytes", "addressed", "owed"):
        assert SEEN[what] > 5, SEEN


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(worlds)
def test_each_signed_answer_has_its_evidence(world: World) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory(prefix="narseal-rule-") as name:
            async with fake_cache() as cache:
                await live(world, Path(name), cache)

    asyncio.run(run())


GOOD = entry("mine-a", CONTENTS[2], compression="none", references=(DEPENDENCY.info.store_path,))


def answer_of(item: Entry) -> Answer:
    return Answer.read(item.info.render())


def test_the_checker_itself_refuses_each_part_that_is_false() -> None:
    named = Trust(is_named=True)
    assert checker.problem(answer_of(GOOD), GOOD.nar, named) is None
    for wrong in ("size", "hash"):
        assert checker.problem(answer_of(_changed(GOOD, wrong)), GOOD.nar, named)
    assert checker.problem(answer_of(GOOD), DEPENDENCY.nar, named)
    assert checker.problem(answer_of(GOOD), None, named)
    assert checker.problem(answer_of(GOOD), GOOD.nar, Trust())
    lacking = answer_of(GOOD.but(references=(EMPTY,)))
    assert checker.problem(lacking, GOOD.nar, named)
    assert checker.problem(lacking, GOOD.nar, replace(named, may_lack_references=True)) is None
    keys = Trust(((UPSTREAM.name, UPSTREAM.public.data),))
    signed = GOOD.signed(UPSTREAM)
    assert checker.problem(answer_of(signed), None, keys) is None
    for lie in ("size", "hash", "path"):
        assert checker.problem(answer_of(_changed(signed, lie)), GOOD.nar, keys)
    assert checker.problem(answer_of(GOOD.signed(STRANGER)), GOOD.nar, keys)


@pytest.mark.parametrize("kind", [kind for kind in ADDRESSES if kind])
def test_the_checker_itself_recomputes_addresses(kind: tuple[Method, str]) -> None:
    method, algorithm = kind
    node = nar.Regular(b"contents")
    plain = b"".join(nar.render(node))
    hashed = plain if method is Method.NAR else node.contents
    ca = ContentAddress(method, Hash(algorithm, hashlib.new(algorithm, hashed).digest()))
    path = ca.store_path("x", (), self_hash="", store_dir="/nix/store")
    assert path
    item = entry("x", node=node, ca=ca, path=path, compression="none")
    found = checker.problem(answer_of(item), item.nar, Trust())
    assert (found is None) == (method is not Method.GIT)
    other = replace(item, info=replace(item.info, store_path=store_path("x")))
    assert checker.problem(answer_of(other), item.nar, Trust())
    wrong = ContentAddress(method, Hash(algorithm, bytes(len(ca.hash.digest))))
    at = wrong.store_path("x", (), self_hash="", store_dir="/nix/store")
    assert at
    assert checker.problem(answer_of(item.but(ca=wrong, store_path=at)), item.nar, Trust())
