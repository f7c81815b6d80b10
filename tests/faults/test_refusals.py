"""What an upstream may not get away with: nothing of it is served whole or published.

Rows U1 to U12 of docs/security.md.
"""

from __future__ import annotations

import base64
import bz2
import lzma
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from narseal.errors import MalformedNarInfo
from narseal.nix.hashes import Hash
from narseal.nix.narinfo import NarInfo
from tests.tools.cache import COMPRESS, Entry, entry, key, store_path
from tests.tools.narseal import OPERATOR, UPSTREAM, metric, narseal
from tests.tools.upstream import FakeCache, status

GOOD = entry("good").signed(UPSTREAM)
STRANGER = key("stranger-1")
NAMESAKE = key("namesake")


def forged(item: Entry) -> bytes:
    """A signature under the right name with wrong bytes."""
    signature = f"{UPSTREAM.name}:{base64.b64encode(bytes(64)).decode()}"
    return item.info.with_signatures(()).render() + f"Sig: {signature}\n".encode()


def by_namesake(item: Entry) -> bytes:
    """The right name, another key."""
    signature = NAMESAKE.sign(item.info.fingerprint())
    text = str(signature).replace(NAMESAKE.name, UPSTREAM.name, 1)
    return item.info.with_signatures(()).render() + f"Sig: {text}\n".encode()


def line(old: str, new: str) -> Callable[[Entry], bytes]:
    """The narinfo with a piece of its text replaced."""

    def change(item: Entry) -> bytes:
        text = item.info.render().decode("latin-1")
        assert old in text
        return text.replace(old, new, 1).encode("latin-1")

    return change


def more(text: str) -> Callable[[Entry], bytes]:
    """The narinfo with something behind it."""
    return lambda item: item.info.render() + text.encode("latin-1")


NARINFOS: dict[str, tuple[Callable[[Entry], bytes], str]] = {
    "forged signature": (forged, "unsigned"),
    "right name, wrong key": (by_namesake, "unsigned"),
    "no signature": (lambda e: e.signed().info.render(), "unsigned"),
    "another upstream's key": (lambda e: e.signed(STRANGER).info.render(), "unsigned"),
    "only our own name": (lambda e: e.signed(OPERATOR).info.render(), "unsigned"),
    "another path's": (lambda e: entry("other").signed(UPSTREAM).info.render(), "wrong-path"),
    "NarHash changed": (
        lambda e: e.but(nar_hash=Hash.sha256(b"x")).info.render(),
        "unsigned",
    ),
    "NarSize changed": (lambda e: e.but(nar_size=e.info.nar_size + 8).info.render(), "unsigned"),
    "reference added": (
        lambda e: e.but(references=(store_path("dep"),)).info.render(),
        "unsigned",
    ),
    "absolute URL": (line("URL: nar/", "URL: http://127.0.0.1:1/nar/"), "absolute-url"),
    "protocol-relative URL": (line("URL: nar/", "URL: //127.0.0.1/nar/"), "absolute-url"),
    "absolute path": (line("URL: nar/", "URL: /nar/"), "absolute-url"),
    "parent folder": (line("URL: nar/", "URL: ../nar/"), "escapes-upstream"),
    "parent folder inside": (line("URL: nar/", "URL: nar/../../"), "escapes-upstream"),
    "encoded dots": (line("URL: nar/", "URL: nar/%2e%2E/"), "escapes-upstream"),
    "encoded slash": (line("URL: nar/", "URL: nar%2f"), "escapes-upstream"),
    "doubly encoded": (line("URL: nar/", "URL: nar/%252e%252e/"), "escapes-upstream"),
    "backslash": (line("URL: nar/", "URL: nar/..\\"), "escapes-upstream"),
    "space in URL": (line("URL: nar/", "URL: nar/ "), "malformed"),
    "newline in a field": (line("Compression: xz", "Compression: xz\n\n"), "malformed"),
    "carriage return": (line("Compression: xz", "Compression: xz\r"), "malformed"),
    "NUL": (line("Compression: xz", "Compression: x\0z"), "malformed"),
    "Latin-1": (line("Compression: xz", "Compression: xz\xe9"), "malformed"),
    "unknown compression": (line("Compression: xz", "Compression: rar"), "malformed"),
    "compression that cannot be decoded": (
        line("Compression: xz", "Compression: lz4"),
        "unsupported-compression",
    ),
    "field twice": (more("NarSize: 1\n"), "malformed"),
    "no final newline": (lambda e: e.info.render()[:-1], "malformed"),
    "plus sign": (line("NarSize: ", "NarSize: +"), "malformed"),
    "upper-case hash": (
        lambda e: e.info.render().replace(
            str(e.info.nar_hash).encode(), b"sha256:" + e.info.nar_hash.nix32.upper().encode()
        ),
        "malformed",
    ),
    "empty": (lambda e: b"", "malformed"),
    "10 MB": (lambda e: e.info.render() + b"X: " + b"x" * (10 << 20) + b"\n", "too-large"),
    "10,000 Sig lines": (
        lambda e: e.info.render() + b"Sig: a-1:" + b"A" * 86 + b"==\n" + b"Sig: x:y\n" * 10_000,
        "malformed",
    ),
    "10,000 references, none of them signed": (
        lambda e: e.but(references=tuple(store_path(f"r{n}") for n in range(10_000))).info.render(),
        "unsigned",
    ),
    "20,001 references": (
        lambda e: e.but(references=tuple(store_path(f"r{n}") for n in range(20_001))).info.render(),
        "malformed",
    ),
    "CA of another path": (
        more(f"CA: fixed:r:{Hash.sha256(b'x')}\n"),
        "ca-mismatch",
    ),
    "size beyond the bound": (
        lambda e: e.but(nar_size=1 << 50).signed(UPSTREAM).info.render(),
        "too-large",
    ),
}


@pytest.mark.parametrize("case", NARINFOS)
async def test_bad_narinfo_is_404_with_a_reason_and_the_next_upstream_is_asked(
    case: str, tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    change, reason = NARINFOS[case]
    upstream.files = {f"{GOOD.hash}.narinfo": change(GOOD), GOOD.info.url: GOOD.file}
    before = metric("narseal_rejected_total", reason=reason)
    async with narseal(tmp_path / "alone", {"url": upstream.url}) as client:
        assert await client.refusal(f"{GOOD.hash}.narinfo") == reason
        assert (await client.get(GOOD.info.url))[0] == 404
        assert client.published() == set()
    assert metric("narseal_rejected_total", reason=reason) == before + 1
    second.add(GOOD)
    async with narseal(
        tmp_path / "both", {"url": upstream.url}, {"url": second.url, "priority": 50}
    ) as client:
        info = await client.narinfo(GOOD.hash)
        assert (await client.get(info.url))[1] == GOOD.file


async def test_1000_narinfos_under_each_others_names_are_all_refused(
    tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"n{n}", b"same").signed(UPSTREAM) for n in range(1000)]
    for item, other in zip(items, items[1:] + items[:1], strict=True):
        upstream.files[f"{item.hash}.narinfo"] = other.info.render()
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        for item in items:
            assert await client.refusal(f"{item.hash}.narinfo") == "wrong-path"


async def test_10000_signed_references_are_served_as_nix_would(
    tmp_path: Path, upstream: FakeCache
) -> None:
    many = entry("many", references=tuple(store_path(f"r{n}") for n in range(10_000)))
    upstream.add(many.signed(UPSTREAM))
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        assert len((await client.narinfo(many.hash)).references) == 10_000


@dataclass(frozen=True)
class Bytes:
    """A NAR file that is not what its signed narinfo says."""

    make: Callable[[bytes, bytes], bytes]
    reason: str


def zero_bomb(compress: Callable[[bytes], bytes]) -> Callable[[bytes, bytes], bytes]:
    return lambda nar, file: compress(nar[:-8] + bytes(256 << 20))


FILES = {
    "truncated file": Bytes(lambda nar, file: file[:-20], "truncated"),
    "truncated NAR in a whole stream": Bytes(
        lambda nar, file: lzma.compress(nar[:-16]), "malformed-nar"
    ),
    "trailing bytes in the NAR": Bytes(lambda nar, file: lzma.compress(nar + bytes(8)), "nar-size"),
    "trailing bytes behind the stream": Bytes(lambda nar, file: file + b"more" * 9, "corrupt"),
    "a second stream": Bytes(lambda nar, file: file + lzma.compress(b"more"), "nar-size"),
    "flipped byte of the file": Bytes(
        lambda nar, file: file[:40] + bytes([file[40] ^ 1]) + file[41:], "corrupt"
    ),
    "other content of the same size": Bytes(
        lambda nar, file: lzma.compress(nar.replace(b"good", b"evil")), "content-mismatch"
    ),
    "bytes of another compression": Bytes(lambda nar, file: bz2.compress(nar), "wrong-compression"),
    "bomb": Bytes(zero_bomb(lzma.compress), "nar-size"),
    "empty": Bytes(lambda nar, file: b"", "truncated"),
}


@pytest.mark.parametrize("sign_when", ["evidence", "content"])
@pytest.mark.parametrize("case", FILES)
async def test_wrong_bytes_are_never_served_whole_nor_published(
    case: str, sign_when: str, tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    wrong = FILES[case].make(GOOD.nar, GOOD.file)
    upstream.add(GOOD)
    upstream.files[GOOD.info.url] = wrong
    before = metric("narseal_rejected_total", reason=FILES[case].reason)
    async with narseal(tmp_path / "alone", {"url": upstream.url, "sign_when": sign_when}) as client:
        if sign_when == "evidence":
            info = await client.narinfo(GOOD.hash)
            assert await client.refusal(info.url) == FILES[case].reason
        # now the path is withdrawn, and nothing of it is left
        assert (await client.get(f"{GOOD.hash}.narinfo"))[0] == 404
        assert (await client.get(GOOD.info.url))[0] == 404
        assert client.published() == set()
        quarantined = list((client.storage / ".narseal" / "quarantine").iterdir())
        assert [q.read_bytes()[:64] for q in quarantined] in ([wrong[:64]], [b""])
    assert metric("narseal_rejected_total", reason=FILES[case].reason) == before + 1
    second.add(GOOD)
    async with narseal(
        tmp_path / "both",
        {"url": upstream.url, "sign_when": sign_when},
        {"url": second.url, "priority": 50},
    ) as client:
        info = await client.narinfo(GOOD.hash)
        code, body, _ = await client.get(info.url)
        assert (code, body) == (200, GOOD.file)


async def test_a_large_wrong_nar_breaks_off_and_then_the_next_upstream_serves(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    big = entry("big", b"x" * (8 << 20), compression="none").signed(UPSTREAM)
    upstream.add(big)
    upstream.files[big.info.url] = big.file[:-100] + b"y" * 60 + big.file[-40:]
    second.add(big)
    async with narseal(
        tmp_path, {"url": upstream.url}, {"url": second.url, "priority": 50}
    ) as client:
        info = await client.narinfo(big.hash)
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.get(info.url)
        assert client.published() == set()
        assert (await client.narinfo(big.hash)).url == info.url
        assert (await client.get(info.url))[1] == big.file


async def test_every_flipped_bit_of_a_small_nar_is_found(
    tmp_path: Path, upstream: FakeCache
) -> None:
    small = entry("small", b"0123456789abcdef" * 8, compression="none").signed(UPSTREAM)
    async with narseal(tmp_path, {"url": upstream.url}, limits={"negative_ttl": "0s"}) as client:
        for bit in range(0, len(small.file) * 8, 7):
            flipped = bytearray(small.file)
            flipped[bit // 8] ^= 1 << bit % 8
            item = small.but(url=f"nar/{bit}.nar", file_hash=None, file_size=None)
            upstream.add(item)
            upstream.files[item.info.url] = bytes(flipped)
            info = await client.narinfo(item.hash)
            assert (await client.get(info.url))[0] == 404, bit
            assert client.published() == set()


async def test_wrong_file_hash_over_right_content_is_corrected(
    tmp_path: Path, upstream: FakeCache
) -> None:
    claimed = Hash.sha256(b"not this file")
    assert GOOD.info.file_hash
    item = GOOD.but(file_hash=claimed, file_size=7)
    upstream.add(item)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        old = await client.narinfo(item.hash)
        assert (await client.get(old.url))[1] == GOOD.file
        true = f"nar/{GOOD.info.file_hash.nix32}.nar.xz"
        await client.until(lambda: true in client.published())

        async def corrected() -> NarInfo:
            return await client.narinfo(item.hash)

        while (new := await corrected()).url != true:
            pass
        assert (new.file_hash, new.file_size) == (GOOD.info.file_hash, len(GOOD.file))
        # clients remember the old address for a month: the same bytes, for ever
        assert (await client.get(old.url))[1] == GOOD.file
        assert (await client.get(new.url))[1] == GOOD.file
    assert metric("narseal_corrected_total") >= 1


async def test_two_narinfos_that_share_a_nar_name_do_not_collide(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """nixpkgs#533028: one path's narinfo named another path's NAR."""
    keyutils = entry("keyutils").signed(UPSTREAM)
    openapv = (
        entry("openapv")
        .but(url=keyutils.info.url, file_hash=keyutils.info.file_hash, file_size=len(keyutils.file))
        .signed(UPSTREAM)
    )
    upstream.add(openapv)
    upstream.add(keyutils)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        wrong = await client.narinfo(openapv.hash)
        right = await client.narinfo(keyutils.hash)
        assert wrong.url != right.url
        assert (await client.get(wrong.url))[0] == 404
        assert (await client.get(right.url))[1] == keyutils.file
        assert (await client.get(f"{openapv.hash}.narinfo"))[0] == 404
        assert (await client.narinfo(keyutils.hash)).url == right.url


async def test_a_true_name_that_a_lie_has_taken_stays_with_the_lie(
    tmp_path: Path, upstream: FakeCache
) -> None:
    honest = entry("honest").signed(UPSTREAM)
    liar = entry("liar").but(file_hash=honest.info.file_hash, url="nar/liar").signed(UPSTREAM)
    wrong_hash = honest.but(file_hash=Hash.sha256(b"another"), url="nar/honest")
    upstream.add(liar, wrong_hash)
    async with narseal(tmp_path, {"url": upstream.url}, prefetch="off") as client:
        taken = await client.narinfo(liar.hash)
        first = await client.narinfo(honest.hash)
        assert (await client.get(first.url))[1] == honest.file
        await client.until(lambda: len(client.published()) == 2)
        new = await client.narinfo(honest.hash)
        assert new.url not in (first.url, taken.url)
        for url in (first.url, new.url):
            assert (await client.get(url))[1] == honest.file
        assert (await client.narinfo(liar.hash)).url == taken.url
        assert (await client.get(taken.url))[1] == liar.file


async def test_a_pinned_path_never_changes_its_hash(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    old, new = entry("app", b"old").signed(UPSTREAM), entry("app", b"new").signed(UPSTREAM)
    upstream.add(old)
    second.add(new)
    async with narseal(
        tmp_path, {"url": upstream.url}, {"url": second.url, "priority": 50}
    ) as client:
        assert (await client.narinfo(old.hash)).nar_hash == old.info.nar_hash
        upstream.files[old.info.url] = b"garbage"
        assert (await client.get(old.info.url))[0] == 404
        # withdrawn: asked for anew, and what the other one says contradicts the pin
        assert await client.refusal(f"{old.hash}.narinfo") in ("conflict", "refused-source")
        assert metric("narseal_rejected_total", reason="conflict") >= 1


async def test_our_own_name_on_an_upstream_signature_is_dropped_and_replaced(
    tmp_path: Path, upstream: FakeCache
) -> None:
    fake = f"Sig: {OPERATOR.name}:{base64.b64encode(b'x' * 64).decode()}\n".encode()
    upstream.add(GOOD)
    upstream.files[f"{GOOD.hash}.narinfo"] += fake + b"Sig: nonsense\nX-Unknown: kept\n"
    foreign = STRANGER.sign(GOOD.info.fingerprint())
    upstream.files[f"{GOOD.hash}.narinfo"] += f"Sig: {foreign}\n".encode()
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(GOOD.hash)
        names = [signature.key_name for signature in info.signatures]
        assert sorted(names) == sorted([OPERATOR.name, UPSTREAM.name, STRANGER.name])
        assert info.extra == (("X-Unknown", "kept"),)


@pytest.mark.parametrize("compression", sorted(COMPRESS))
async def test_every_compression_that_can_be_verified_is_served(
    compression: str, tmp_path: Path, upstream: FakeCache
) -> None:
    item = entry("x", b"some text " * 10_000, compression=compression).signed(UPSTREAM)
    upstream.add(item)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(item.hash)
        assert (await client.get(info.url))[1] == item.file


async def test_redirect_of_a_nar_to_a_private_address_is_not_followed(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    upstream.add(GOOD)
    second.add(GOOD)
    place = f"{second.url}/{GOOD.info.url}"
    upstream.fault(GOOD.info.url, status(302, Location=place), times=20)
    async with narseal(tmp_path, {"url": upstream.url}) as client:
        info = await client.narinfo(GOOD.hash)
        code, body, _ = await client.get(info.url)
        assert (code, b"stalls" in body) == (502, False), body
    assert not second.asked[GOOD.info.url]


async def test_refused_connection_for_a_nar_is_no_timeout(
    tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(GOOD)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = "http://{}:{}".format(*closed.getsockname())
    upstream.fault(GOOD.info.url, status(302, Location=f"{nowhere}/x"), times=20)
    async with narseal(tmp_path, {"url": upstream.url, "redirect_origins": [nowhere]}) as client:
        info = await client.narinfo(GOOD.hash)
        code, body, _ = await client.get(info.url)
        assert (code, b"refused" in body) == (502, True), body


async def test_redirect_to_a_private_address_is_not_followed(
    tmp_path: Path, upstream: FakeCache, second: FakeCache
) -> None:
    second.add(GOOD)
    target = f"{second.url}/{GOOD.hash}.narinfo"
    upstream.fault(f"{GOOD.hash}.narinfo", status(302, Location=target), times=2)
    async with narseal(tmp_path / "a", {"url": upstream.url}) as client:
        assert (await client.get(f"{GOOD.hash}.narinfo"))[0] == 502
    assert not second.asked
    async with narseal(
        tmp_path / "b", {"url": upstream.url, "redirect_origins": [second.url]}
    ) as client:
        await client.narinfo(GOOD.hash)


def test_malformed_narinfo_names_line_and_field() -> None:
    text = GOOD.info.render() + b"NarSize: 5\n"
    with pytest.raises(MalformedNarInfo) as caught:
        NarInfo.parse(text)
    assert (caught.value.line, caught.value.field) == (text.count(b"\n"), "NarSize")
