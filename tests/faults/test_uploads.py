"""Uploads over HTTP: what is taken, and every refusal with its status and sentence."""

from __future__ import annotations

import asyncio
import base64
import gzip
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from narseal.custody import tokens
from narseal.nix.hashes import Hash
from narseal.nix.keys import SecretKey
from narseal.nix.narinfo import NarInfo
from tests.tools.cache import Entry, entry, key, pointer, store_path, with_debug_info
from tests.tools.narseal import (
    OPERATOR,
    UPSTREAM,
    Client,
    is_countersigned,
    metric,
    narseal,
    unclaimed,
)
from tests.tools.upstream import FakeCache, Gate
from tests.tools.waiting import PATIENCE, eventually

ITEM = entry("my-app-1", b"uploaded", compression="zstd")
OTHER = entry("other-1", b"other", compression="zstd")


class Uploader:
    """Puts with a token."""

    def __init__(self, client: Client, token: str) -> None:
        self.client = client
        self.headers = {"Authorization": f"Bearer {token}"}

    async def put(self, name: str, data: Any, **headers: str) -> tuple[int, str]:
        async with self.client.session.put(
            f"{self.client.url}/{name}", data=data, headers=self.headers | headers
        ) as response:
            return response.status, await response.text()

    async def path(self, item: Entry) -> tuple[int, str]:
        """A NAR, which must be taken, and its narinfo."""
        status, text = await self.put(item.info.url, item.file)
        assert status == 201, text
        return await self.put(f"{item.hash}.narinfo", item.info.render())


def add(folder: Path, *allow: str, expires: float | None = None) -> str:
    file = folder / "tokens"
    name = f"ci-{there + 1}" if (there := len(tokens.listed(file))) else "ci"
    return tokens.add(file, name, allow=allow or ("*",), expires=expires)[1]


@asynccontextmanager
async def uploading(folder: Path, *upstreams: Any, **upload: Any) -> AsyncIterator[Uploader]:
    """A narseal that takes uploads, and one who may bring everything."""
    folder.mkdir(parents=True, exist_ok=True)
    token = add(folder)
    settings = {"enabled": True, "tokens_file": str(folder / "tokens")} | upload
    async with narseal(folder, *upstreams, upload=settings) as client:
        yield Uploader(client, token)


async def test_uploaded_path_is_countersigned_and_kept(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        assert await client.refusal(f"{ITEM.hash}.narinfo") == "absent"
        assert (await client.head(ITEM.info.url))[0] == 404
        status, text = await uploader.put(ITEM.info.url, ITEM.file)
        assert status == 201, text
        assert client.published() == set()
        assert (await client.head(ITEM.info.url))[0] == 404
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render())
        assert status == 201, text
        info = await client.narinfo(ITEM.hash)
        assert info.fingerprint() == ITEM.info.fingerprint()
        assert (await client.get(info.url))[1] == ITEM.file
        assert (await client.head(ITEM.info.url))[0] == 200
        await client.until(lambda: client.published() == {f"{ITEM.hash}.narinfo", info.url})
        assert not unclaimed(client.storage)
        # the same again: nothing is new, nothing is lost
        assert await uploader.path(ITEM) == (200, "")
    async with narseal(tmp_path) as client:
        await client.narinfo(ITEM.hash)


async def test_what_arrives_while_it_is_looked_for_is_not_absent_then(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The upstream's answer is older than the upload, though another absence was looked up in between."""
    gate, name = Gate(), f"{ITEM.hash}.narinfo"
    upstream.fault(name, gate)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        client = uploader.client
        looking = asyncio.create_task(client.get(name))
        await gate.reached.wait()
        assert (await uploader.path(ITEM))[0] == 201
        assert await client.refusal(f"{OTHER.hash}.narinfo") == "absent"
        gate.open()
        await looking
        await client.narinfo(ITEM.hash)


@pytest.mark.parametrize("compression", ["none", "xz", "bzip2", "gzip", "br", "zstd"])
async def test_every_compression_is_taken(compression: str, tmp_path: Path) -> None:
    item = entry("x", b"text " * 1000, compression=compression)
    async with uploading(tmp_path) as uploader:
        assert await uploader.path(item) == (201, "")
        info = await uploader.client.narinfo(item.hash)
        assert (await uploader.client.get(info.url))[1] == item.file


async def test_chunked_bodies_and_encoded_narinfos_are_taken(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(ITEM.file), 7):
            yield ITEM.file[at : at + 7]

    async with uploading(tmp_path) as uploader:
        assert (await uploader.put(ITEM.info.url, chunks()))[0] == 201
        body = gzip.compress(ITEM.info.render())
        answer = await uploader.put(f"{ITEM.hash}.narinfo", body, **{"Content-Encoding": "gzip"})
        assert answer == (201, "")
        await uploader.client.narinfo(ITEM.hash)


async def test_who_may_not_upload(tmp_path: Path) -> None:
    old = add(tmp_path, expires=time.time() - 1)
    mine = add(tmp_path, "my-app-*")
    gone = add(tmp_path)
    tokens.revoke(tmp_path / "tokens", gone.split("_")[1])
    async with uploading(tmp_path) as uploader:
        good = uploader.headers["Authorization"].removeprefix("Bearer ")
        wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
        before = metric("narseal_auth_failures_total")
        for text in ("", "Bearer x", f"Bearer {wrong}", f"Bearer {old}", f"Bearer {gone}",
                     "Basic !", "Digest x"):  # fmt: skip
            for name, data in ((ITEM.info.url, ITEM.file), (f"{ITEM.hash}.narinfo", b"x"),
                               ("nix-cache-info", b"")):  # fmt: skip
                headers = {"Authorization": text} if text else {}
                async with uploader.client.session.put(
                    f"{uploader.client.url}/{name}", data=data, headers=headers
                ) as response:
                    assert response.status == 401, text
                    assert response.headers["WWW-Authenticate"] == 'Basic realm="narseal"'
                    assert "netrc" in await response.text()
            uploader.client.session.cookie_jar.clear()
            if metric("narseal_auth_failures_total") - before > 5:
                break  # the delay grows
        assert metric("narseal_auth_failures_total") > before
        # Basic with a token as the password, as a netrc gives it
        pair = base64.b64encode(f":{mine}".encode()).decode()
        limited = Uploader(uploader.client, "")
        limited.headers = {"Authorization": f"Basic {pair}"}
        assert (await limited.put("nix-cache-info", b"StoreDir: /nix/store\n"))[0] == 200
        assert await limited.path(ITEM) == (201, "")
        status, text = await limited.path(OTHER)
        assert (status, "does not cover other-1; it covers my-app-*" in text) == (403, True)
        assert (await uploader.client.get(f"{OTHER.hash}.narinfo"))[0] == 404


async def test_a_cache_info_is_read_and_its_connection_goes_on(tmp_path: Path) -> None:
    """`nix copy` begins with one."""
    async with uploading(tmp_path) as uploader:
        session, url = uploader.client.session, f"{uploader.client.url}/nix-cache-info"
        for size, status in ((20, 200), (60_000, 200), (70_000, 413)):
            async with session.put(url, data=bytes(size), headers=uploader.headers) as response:
                assert response.status == status
                assert (response.headers.get("Connection") == "close") is (status == 413)


async def test_failed_attempts_are_slowed(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        stranger = Uploader(uploader.client, "narseal_000000000000_" + "A" * 43)
        for _ in range(5):
            assert (await stranger.put("nix-cache-info", b""))[0] == 401
        start = time.monotonic()
        assert (await stranger.put("nix-cache-info", b""))[0] == 401
        assert time.monotonic() - start > 0.7  # the sixth waits for 0.8 s, the first three do not
        assert (await uploader.put("nix-cache-info", b""))[0] == 200


async def test_a_revoked_token_is_no_good_within_seconds(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        assert (await uploader.put("nix-cache-info", b""))[0] == 200
        tokens.revoke(tmp_path / "tokens", "ci")

        async def refused() -> bool:
            return (await uploader.put("nix-cache-info", b""))[0] == 401

        await eventually(refused)


async def test_trusted_key_signs_for_any_token(tmp_path: Path) -> None:
    builder = key("builder-1")
    impostor = SecretKey.from_seed("builder-1", bytes(32))
    folder = tmp_path
    narrow = add(folder, "nothing-*")
    async with uploading(folder, trusted_keys=[str(builder.public)]) as uploader:
        limited = Uploader(uploader.client, narrow)
        assert (await limited.path(OTHER))[0] == 403
        assert (await limited.path(OTHER.signed(impostor)))[0] == 403
        assert await limited.path(OTHER.signed(builder)) == (201, "")
        info = await uploader.client.narinfo(OTHER.hash)
        assert {s.key_name for s in info.signatures} == {"builder-1", OPERATOR.public.name}


WRONG: dict[str, tuple[Entry, bytes, str]] = {
    "NarHash of another": (
        ITEM.but(nar_hash=Hash.sha256(b"x")), ITEM.file, "has hash"),
    "NarSize too small": (ITEM.but(nar_size=100), ITEM.file, "422"),
    "FileSize of another": (ITEM.but(file_size=1), ITEM.file, "its FileHash is"),
    "another hash part": (ITEM.but(store_path=OTHER.info.store_path), ITEM.file, "is of"),
    "URL elsewhere": (ITEM.but(url="nar/x"), ITEM.file, "is not nar/<hash>"),
    "URL escapes": (ITEM.but(url=f"../{ITEM.info.url}"), ITEM.file, "is not nar/<hash>"),
    "URL in another folder": (
        ITEM.but(url=f"log/{ITEM.info.url.removeprefix('nar/')}"), ITEM.file, "is not nar/<hash>"),
    "suffix of another compression": (ITEM.but(compression="xz"), ITEM.file, "suffix"),
    "reference that nobody has": (
        ITEM.but(references=(store_path("nowhere"),)), ITEM.file, "upload it first"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_wrong_narinfo_is_refused_and_nothing_is_visible(what: str, tmp_path: Path) -> None:
    item, file, sentence = WRONG[what]
    async with uploading(tmp_path) as uploader:
        assert (await uploader.put(ITEM.info.url, file))[0] == 201
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", item.info.render())
        assert (status, sentence in f"{status} {text}") == (422, True), text
        assert uploader.client.published() == set()
        assert (await uploader.client.get(f"{ITEM.hash}.narinfo"))[0] == 404
        assert not list((uploader.client.storage / ".narseal/incoming").iterdir())


async def test_wrong_nar_is_refused(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        status, text = await uploader.put(ITEM.info.url, ITEM.file + b"x")
        assert (status, "the file's hash is" in text) == (422, True)
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render())
        assert (status, "upload it before its narinfo" in text) == (422, True)
        # right name, but no NAR of that narinfo: its bytes are not what the compression says
        junk = os.urandom(500)
        name = f"nar/{Hash.sha256(junk).nix32}.nar.zst"
        assert (await uploader.put(name, junk))[0] == 201
        lie = ITEM.but(url=name, file_hash=Hash.sha256(junk), file_size=len(junk))
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", lie.info.render())
        assert status == 422, text
        assert client.published() == set()
        # a narinfo that lies about another's file does not take it away
        good = f"nar/{ITEM.info.url.removeprefix('nar/')}"
        assert (await uploader.put(good, ITEM.file))[0] == 201
        liar = entry("liar", b"another", compression="zstd").but(
            url=good, file_hash=ITEM.info.file_hash, file_size=ITEM.info.file_size
        )
        assert (await uploader.put(f"{liar.hash}.narinfo", liar.info.render()))[0] == 422
        assert (await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render()))[0] == 201


async def test_missing_references_are_refused_where_the_operator_says_so(tmp_path: Path) -> None:
    lying = ITEM.but(references=(OTHER.info.store_path,))
    for mode, expected in (("refuse", 422), ("warn", 201)):
        async with uploading(tmp_path / mode, references=mode) as uploader:
            assert await uploader.path(OTHER) == (201, "")
            status, text = await uploader.path(lying)
            assert status == expected
            if expected == 422:
                assert "does not contain" in text


async def test_nothing_is_overwritten_and_signatures_are_united(tmp_path: Path) -> None:
    one, two = (ITEM.signed(key(name)) for name in ("one-1", "two-1"))
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        assert (await uploader.path(one))[0] == 201
        assert (await uploader.path(two))[0] == 200
        laundered = ITEM.info.with_signatures((key("x").sign(b"other"),))
        forged = NarInfo.parse(
            laundered.render().replace(b"Sig: x:", f"Sig: {OPERATOR.public.name}:".encode())
        )
        assert (await uploader.put(f"{ITEM.hash}.narinfo", forged.render()))[0] == 200
        info = await client.narinfo(ITEM.hash)
        assert {s.key_name for s in info.signatures} == {"one-1", "two-1", OPERATOR.public.name}
        assert is_countersigned(info)
        file = client.storage / f"{ITEM.hash}.narinfo"
        await client.until(lambda: file.exists() and NarInfo.parse(file.read_bytes()) == info)
        other = entry("my-app-1", b"something else", compression="zstd")
        assert other.hash == ITEM.hash
        status, text = await uploader.path(other)
        assert (status, "nothing is overwritten" in text) == (409, True)
        assert await client.narinfo(ITEM.hash) == info


async def test_path_that_an_upstream_has_is_found_at_once_after_its_upload(
    tmp_path: Path, upstream: FakeCache
) -> None:
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        assert await uploader.client.refusal(f"{ITEM.hash}.narinfo") == "absent"
        leaf = OTHER.signed(UPSTREAM)
        upstream.add(leaf)
        above = ITEM.but(references=(leaf.info.store_path,))
        assert (await uploader.path(above))[0] == 201  # what it refers to is at the upstream
        await uploader.client.narinfo(ITEM.hash)


async def test_two_clients_with_one_path_both_see_success(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        answers = await asyncio.gather(*(uploader.path(ITEM) for _ in range(12)))
        assert {status for status, _ in answers} <= {200, 201}
        await uploader.client.narinfo(ITEM.hash)
        for _ in range(3):
            info = await uploader.client.narinfo(ITEM.hash)
            assert (await uploader.client.get(info.url))[1] == ITEM.file


async def test_an_upload_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        host, port = client.url.removeprefix("http://").split(":")
        head = (
            f"PUT /{ITEM.info.url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ITEM.file)}\r\n"
            f"Authorization: {uploader.headers['Authorization']}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + ITEM.file[:-1])
        await writer.drain()
        writer.close()
        await client.until(lambda: not list((client.storage / ".narseal/incoming").iterdir()))
        assert not unclaimed(client.storage)
        assert await uploader.path(ITEM) == (201, "")


async def test_too_large_a_body_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with uploading(tmp_path, nar_size="1M") as uploader:
        client = uploader.client
        host, port = client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"PUT /{ITEM.info.url} HTTP/1.1\r\nHost: x\r\nContent-Length: {5 << 30}\r\n"
            f"Expect: 100-continue\r\nAuthorization: {uploader.headers['Authorization']}\r\n\r\n"
            .encode()
        )  # fmt: skip
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 413")
        writer.close()

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(5000):
                yield bytes(1 << 16)

        try:
            status, _ = await uploader.put(ITEM.info.url, endless())
            assert status == 413
        except (ConnectionError, OSError):
            pass
        assert not list((client.storage / ".narseal/incoming").iterdir())
        # a decompression bomb as a narinfo
        bomb = gzip.compress(bytes(50 << 20))
        status, _ = await uploader.put(f"{ITEM.hash}.narinfo", bomb, **{"Content-Encoding": "gzip"})
        assert status == 413
        assert await uploader.path(ITEM) == (201, "")


async def test_expected_continue_is_answered(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        host, port = uploader.client.url.removeprefix("http://").split(":")
        head = (
            f"PUT /{ITEM.info.url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ITEM.file)}\r\n"
            "Expect: 100-continue\r\n"
        )
        for more, answer in (
            (f"Authorization: {uploader.headers['Authorization']}\r\n", b"HTTP/1.1 100"),
            ("", b"HTTP/1.1 401"),
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"{head}{more}\r\n".encode())
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)).startswith(answer)
            if more:
                await reader.readuntil(b"\r\n")
                writer.write(ITEM.file)
                line = await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE)
                assert line.startswith(b"HTTP/1.1 201")
            writer.close()


async def test_uploads_that_nobody_claims_are_bounded(tmp_path: Path) -> None:
    async with uploading(tmp_path, quarantine_size="8K", quarantine_age="1h") as uploader:
        junk = [os.urandom(400) for _ in range(4)]
        names = [f"nar/{Hash.sha256(data).nix32}.nar" for data in junk]
        answers = [(await uploader.put(n, d))[0] for n, d in zip(names, junk, strict=True)]
        assert answers == [201, 201, 507, 507]
        two_hours_ago = time.time() - 7200
        for waiting in (uploader.client.storage / ".narseal/uploads").iterdir():
            os.utime(waiting, (two_hours_ago, two_hours_ago))

        async def has_room() -> bool:  # when it was full is not looked at again at once
            return bool((await uploader.put(names[3], junk[3]))[0] == 201)

        await eventually(has_room)


async def test_small_uploads_that_nobody_claims_are_bounded(tmp_path: Path) -> None:
    """Each of them is written in one go."""
    async with uploading(tmp_path, quarantine_size="256K") as uploader:
        taken = 0
        while taken < 66:
            data = os.urandom(4000)
            status, _ = await uploader.put(f"nar/{Hash.sha256(data).nix32}.nar", data)
            if status == 507:
                break
            assert status == 201
            taken += 1
        assert 32 <= taken <= 65


@pytest.mark.parametrize(
    "path",
    ["nar/../../etc/x.nar", "nar/%2e%2e/x.nar", "nar/x.nar", "../x.narinfo", "x.narinfo",
     "log/../x", "log/%2e%2e%2fx", "debuginfo/../x.debug", "realisations/../x.doi",
     "build-trace-v2/../../x.doi", f"{'0' * 32}.ls/../x", ".narseal/lock", "nar/" + "0" * 52,
     "pubkey", "keys", f"nar/{'0' * 52}.nar.zst.sigstore.json"],
)  # fmt: skip
async def test_nothing_is_put_anywhere_else(path: str, tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        host, port = uploader.client.url.removeprefix("http://").split(":")
        before = {p for p in tmp_path.rglob("*") if ".sqlite" not in p.name}
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"PUT /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n"
            f"Authorization: {uploader.headers['Authorization']}\r\n\r\nx".encode()
        )
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        assert answer.split()[1] in (b"400", b"404", b"405"), answer
        writer.close()
        assert {p for p in tmp_path.rglob("*") if ".sqlite" not in p.name} == before


async def test_side_files_are_kept_and_not_overwritten(tmp_path: Path) -> None:
    listing = b'{"version":1,"root":{"type":"regular","size":1}}'
    item = entry("my-app-debug", node=with_debug_info("a" * 40), compression="zstd")
    build_id = "debuginfo/" + "a" * 40 + ".debug"
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        for name, good, bad in (
            (f"{item.hash}.ls", listing, b"[]"),
            (build_id, pointer(item, "a" * 40), b"{}"),
        ):
            assert (await uploader.put(name, bad))[0] == 422
            assert (await client.get(name))[0] == 404
            assert (await uploader.put(name, good))[0] == 201
            assert (await uploader.put(name, good))[0] == 201
            assert (await client.get(name))[0] == 404, "nobody vouches for it yet"
        await uploader.path(item)
        assert (await client.get(f"{item.hash}.ls"))[1] == listing
        assert (await client.get(build_id))[1] == pointer(item, "a" * 40)
        assert (await uploader.put(f"{item.hash}.ls", listing))[0] == 201
        assert (await uploader.put(f"{item.hash}.ls", listing + b"\n"))[0] == 409
        log = f"log/{'0' * 32}-x.drv"
        assert (await uploader.put(log, b"built\n"))[0] == 201
        assert (await uploader.put(log, b"other\n"))[0] == 409
        assert (await client.get(log))[1] == b"built\n"


async def test_realisation_comes_after_its_path(tmp_path: Path) -> None:
    name = f"realisations/sha256:{'a' * 64}!out.doi"
    body = (
        f'{{"dependentRealisations":{{}},"id":"sha256:{"a" * 64}!out",'
        f'"outPath":"{ITEM.info.store_path}","signatures":[]}}'
    ).encode()
    async with uploading(tmp_path) as uploader:
        client = uploader.client
        status, text = await uploader.put(name.replace("!", "%21"), body)
        assert (status, "upload it first" in text) == (422, True)
        await uploader.path(ITEM)
        assert (await uploader.put(name.replace("!", "%21"), body))[0] == 201
        assert OPERATOR.public.name.encode() in (await client.get(name))[1]
        await uploader.path(OTHER)
        other = body.replace(
            str(ITEM.info.store_path).encode(), str(OTHER.info.store_path).encode()
        )
        assert (await uploader.put(name.replace("!", "%21"), other))[0] == 409


async def test_private_cache_is_read_with_a_token(tmp_path: Path) -> None:
    async with uploading(tmp_path, private=True) as uploader:
        assert await uploader.path(ITEM) == (201, "")
        hit = await uploader.client.get(f"{ITEM.hash}.narinfo")
        miss = await uploader.client.get(f"{'0' * 32}.narinfo")
        assert hit[:2] == miss[:2] and hit[0] == 401
        for _ in range(3):
            status, _, _ = await uploader.client.get(
                f"{ITEM.hash}.narinfo", headers=uploader.headers
            )
            assert status == 200
            assert (await uploader.client.get(f"{ITEM.hash}.narinfo"))[0] == 401
        assert (await uploader.client.get("healthz"))[0] == 200


async def test_without_uploads_nothing_can_be_put(tmp_path: Path) -> None:
    async with narseal(tmp_path) as client:
        stranger = Uploader(client, "x")
        assert (await stranger.put(ITEM.info.url, ITEM.file))[0] == 405


async def test_below_upload_no_upstream_is_asked(tmp_path: Path, upstream: FakeCache) -> None:
    theirs = entry("theirs-1", b"theirs").signed(UPSTREAM)
    upstream.add(theirs)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        client = uploader.client
        names = [f"{theirs.hash}.narinfo", theirs.info.url, f"{theirs.hash}.ls",
                 f"log/{theirs.info.store_path}", f"{ITEM.hash}.narinfo",
                 f"realisations/sha256:{'a' * 64}!out.doi"]  # fmt: skip
        for name in names:
            assert (await client.get(f"upload/{name}"))[0] == 404
            assert (await client.head(f"upload/{name}"))[0] == 404
        assert sum(upstream.asked.values()) == 0
        assert (await client.get("upload/nix-cache-info"))[0] == 200
        await client.narinfo(theirs.hash)  # admitted, and still not in storage
        assert (await client.get(f"upload/{theirs.hash}.narinfo"))[0] == 404
        assert (await uploader.put(f"upload/{ITEM.info.url}", ITEM.file))[0] == 201
        assert (await uploader.put(f"upload/{ITEM.hash}.narinfo", ITEM.info.render()))[0] == 201
        for prefix in ("", "upload/"):
            info = await client.narinfo(ITEM.hash)
            status, body, _ = await client.get(f"{prefix}{ITEM.hash}.narinfo")
            assert (status, body) == (200, info.render())
            assert (await client.get(f"{prefix}{info.url}"))[1] == ITEM.file
    async with narseal(tmp_path) as client:  # nobody uploads here
        assert (await client.get("upload/nix-cache-info"))[0] == 404


async def test_signatures_of_strangers_are_bounded_and_leave_room_for_ours(
    tmp_path: Path, upstream: FakeCache
) -> None:
    strangers = [key(f"stranger-{n:02}") for n in range(40)]
    theirs = entry("crowded-1", b"crowded").signed(UPSTREAM, *strangers[:31])
    upstream.add(theirs)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        info = await uploader.client.narinfo(theirs.hash)
        assert len(info.signatures) <= 32
        assert "upstream-1" in {s.key_name for s in info.signatures}
        assert await uploader.path(ITEM.signed(*strangers[:31])) == (201, "")
        answers = [
            await uploader.put(f"{ITEM.hash}.narinfo", ITEM.signed(stranger).info.render())
            for stranger in strangers[31:]
        ]
        assert {status for status, _ in answers} == {422}
        assert "too many signatures" in answers[0][1]
        assert len((await uploader.client.narinfo(ITEM.hash)).signatures) <= 32


async def test_no_signature_is_lost_that_comes_with_others_at_the_same_time(
    tmp_path: Path,
) -> None:
    strangers = [key(f"stranger-{n:02}") for n in range(16)]
    async with uploading(tmp_path) as uploader:
        assert await uploader.path(ITEM) == (201, "")
        answers = await asyncio.gather(
            *(
                uploader.put(f"{ITEM.hash}.narinfo", ITEM.signed(stranger).info.render())
                for stranger in strangers
            )
        )
        assert {status for status, _ in answers} == {200}
        names = {s.key_name for s in (await uploader.client.narinfo(ITEM.hash)).signatures}
        assert names == {"operator-1", *(s.public.name for s in strangers)}


async def test_upload_whose_file_name_an_upstream_claimed_for_another_nar(
    tmp_path: Path, upstream: FakeCache
) -> None:
    """The upstream's narinfo gave the name away; the upload is served under its NAR's."""
    assert ITEM.info.file_hash
    lie = entry("lie-1", b"lie", compression="zstd").signed(UPSTREAM)
    lie = lie.but(file_hash=ITEM.info.file_hash, file_size=ITEM.info.file_size, url=ITEM.info.url)
    upstream.add(lie)
    async with uploading(tmp_path, {"url": upstream.url}) as uploader:
        client = uploader.client
        assert (await client.narinfo(lie.hash)).url == ITEM.info.url
        assert await uploader.path(ITEM) == (201, "")
        info = await client.narinfo(ITEM.hash)
        assert info.url == f"nar/{ITEM.info.nar_hash.nix32}.nar.zst"
        assert (await client.get(info.url))[1] == ITEM.file
        assert (await client.get(ITEM.info.url))[1] == lie.file  # whose name it is
        again = entry("copy-1", b"uploaded", compression="zstd")
        assert again.info.nar_hash == ITEM.info.nar_hash
        assert await uploader.path(again) == (201, "")
        assert (await client.narinfo(again.hash)).url == info.url
