"""Keys in a SoftHSM token, made by OpenSC's own tool: Nix and cosign accept what it signs."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from pathlib import Path

import aiohttp
import pytest

from narseal.cosign import statement
from narseal.custody.pkcs11 import Pkcs11CosignKey, TokenUrl
from narseal.errors import ConfigError, Unavailable
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo
from tests.tools.asking import must_come
from tests.tools.cache import Entry, entry
from tests.tools.command import narseal_command
from tests.tools.cosign import Cosign
from tests.tools.memory import in_memory
from tests.tools.narseal import UPSTREAM, Process, narseal_process, render_toml, settings
from tests.tools.nix import nix
from tests.tools.signer import MODULE, SoftHsm
from tests.tools.upstream import FakeCache

pytestmark = pytest.mark.real

ITEM = entry("token-1", b"x", compression="zstd").signed(UPSTREAM)


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsm:
    folder = tmp_path / "hsm"
    folder.mkdir()
    token = SoftHsm(folder)
    for name, value in token.environment.items():
        monkeypatch.setenv(name, value)
    return token


async def test_nix_and_cosign_accept_what_the_token_signs(
    hsm: SoftHsm, cosign: Cosign, tmp_path: Path, upstream: FakeCache
) -> None:
    upstream.add(ITEM)
    there = {"url": upstream.url}
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    by_token = {"mode": "key", "key": hsm.url("release"), "batch_max_age": "100ms"}
    with narseal_process(tmp_path / "n", there, signing=signing, cosign=by_token) as process:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{process.url}/pubkey") as response:
                public = PublicKey.parse(await response.text())
            assert public.name == "hsm-1"
            with nix() as client:
                client.config["trusted-public-keys"] = str(public)
                await asyncio.to_thread(
                    client.run, "nix", "copy", "--from", process.url, "--to",
                    f"local?root={client.path('store')}", f"/nix/store/{ITEM.info.store_path}",
                )  # fmt: skip
            file, bundle, pub = (cosign.folder / name for name in ("x", "b.json", "cosign.pub"))
            file.write_bytes(ITEM.file)
            for address, target in (
                ("cosign.pub", pub),
                (f"{ITEM.info.url}.sigstore.json", bundle),
            ):
                target.write_bytes(await must_come(session, f"{process.url}/{address}"))
            cosign.run(
                "verify-blob", "--key", pub, "--bundle", bundle, "--insecure-ignore-tlog", file
            )
            async with session.get(
                f"{process.url}/attestations/sha256:{ITEM.info.nar_hash.digest.hex()}"
            ) as response:
                bundle.write_bytes(await response.read())
            cosign.run(
                "verify-blob-attestation", "--key", pub, "--bundle", bundle, "--type",
                statement.PREDICATE_TYPE, "--insecure-ignore-tlog", file,
            )  # fmt: skip
        assert hsm.pin not in process.log.read_text()


async def test_key_of_a_token_is_not_in_the_proxy(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """Even SoftHSM, which is a library of the very process, shows it nowhere between signatures."""
    upstream.add(ITEM)
    seed = hashlib.sha256(b"a key that is looked for").digest()
    hsm.bring("known-1", seed)
    signing = {"key": [{"url": hsm.url("known-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{process.url}/{ITEM.hash}.narinfo") as response:
                assert "Sig: known-1:" in await response.text()
        text = base64.b64encode(seed)[:40]
        for pid in (process.process.pid, *process.workers()):
            assert in_memory(pid, seed, text, seed.hex().encode()) == [0, 0, 0]
        shown = process.log.read_text()
        assert text.decode() not in shown


async def test_a_token_that_was_away_is_logged_into_again(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"t{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(6)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:

            async def status(number: int) -> int:
                async with session.get(f"{process.url}/{items[number].hash}.narinfo") as response:
                    if response.status == 503:
                        assert response.headers["Retry-After"]
                    elif response.status == 200:
                        assert "Sig: hsm-1:" in await response.text()
                    return response.status

            assert await status(0) == 200
            tokens, away = hsm.folder / "tokens", hsm.folder / "away"
            tokens.rename(away)
            assert await status(1) in (200, 503)  # SoftHSM may still have it in memory
            tokens.mkdir()
            assert await status(2) == 503
            assert await status(0) == 200  # what was signed is served on
            tokens.rmdir()
            away.rename(tokens)
            assert [await status(n) for n in range(6)] == [200] * 6


async def test_a_key_that_was_not_found_once_is_looked_for_again(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """A token that comes back may show itself before its keys."""
    items = [entry(f"k{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(3)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            assert (await _asked(session, process, items[0]))[0] == 200
            kept = hsm.hide_keys()
            status, said = await _asked(session, process, items[1])
            assert (status, "NoSuchKey" in said) == (503, True)
            hsm.show_keys(kept)
            assert [(await _asked(session, process, item))[0] for item in items] == [200] * 3


async def test_a_pin_that_was_refused_is_not_presented_again(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """A few refusals lock a token for good, and each waiting client would cause one."""
    items = [entry(f"p{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(3)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            assert (await _asked(session, process, items[0]))[0] == 200
            kept = hsm.hide_keys()
            hsm.pin_file.write_text("wrong-pin")
            status, said = await _asked(session, process, items[1])
            assert (status, said.endswith("PinIncorrect\n")) == (503, True)
            hsm.show_keys(kept)
            status, said = await _asked(session, process, items[1])
            assert (status, "was refused; correct it" in said) == (503, True)
            hsm.pin_file.write_text(hsm.pin)
            assert [(await _asked(session, process, item))[0] for item in items] == [200] * 3


async def test_all_workers_together_present_a_wrong_pin_once(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """Four of them locked a token that bears three refusals."""
    items = [entry(f"w{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(60)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(
        tmp_path / "n", {"url": upstream.url}, signing=signing, workers=4
    ) as process:

        async def asked(item: Entry) -> str:
            async with aiohttp.ClientSession() as session:  # whichever worker takes it
                return (await _asked(session, process, item))[1]

        kept = hsm.hide_keys()
        hsm.pin_file.write_text("wrong-pin")
        said = [await asked(item) for item in items]
        assert sum(text.endswith("PinIncorrect\n") for text in said) == 1
        assert sum("was refused; correct it" in text for text in said) == len(said) - 1
        hsm.show_keys(kept)
        hsm.pin_file.write_text(hsm.pin)
        assert all(["Sig: hsm-1:" in await asked(item) for item in items])


async def test_what_another_key_of_the_same_label_signs_is_not_given_out(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """It was served, pinned and counted as ours, though no client's key verified it."""
    items = [entry(f"s{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(3)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            assert (await _asked(session, process, items[0]))[0] == 200
            kept = hsm.hide_keys()
            assert (await _asked(session, process, items[1]))[0] == 503
            hsm.make("hsm-1", "EC:edwards25519", "09")
            status, said = await _asked(session, process, items[1])
            assert (status, "does not verify what the token signs" in said) == (503, True)
            hsm.hide_keys()
            hsm.show_keys(kept)
            public = PublicKey.parse((await must_come(session, f"{process.url}/pubkey")).decode())
            for item in items:
                info = NarInfo.parse(await must_come(session, f"{process.url}/{item.hash}.narinfo"))
                (ours,) = [made for made in info.signatures if made.key_name == public.name]
                assert public.verifies(info.fingerprint(), ours)


def test_what_another_cosign_key_of_the_same_label_signs_is_not_given_out(hsm: SoftHsm) -> None:
    key = Pkcs11CosignKey(hsm.url("release"))
    digest = hashlib.sha256(b"x").digest()
    assert key.public.verifies(digest, key.sign_digest(digest))
    hsm.hide_keys()
    with pytest.raises(Unavailable, match="NoSuchKey"):
        key.sign_digest(digest)
    hsm.make("release", "EC:prime256v1", "09")
    with pytest.raises(Unavailable, match="does not verify what the token signs"):
        key.sign_digest(digest)


def test_a_private_key_whose_public_key_is_another_is_said_at_once(
    hsm: SoftHsm, tmp_path: Path
) -> None:
    hsm.tool("--delete-object", "--type", "privkey", "--label", "hsm-1")
    hsm.bring("hsm-1", hashlib.sha256(b"another key").digest())
    hsm.tool("--delete-object", "--type", "pubkey", "--id", "0a")
    file = tmp_path / "narseal.toml"
    file.write_text(render_toml(settings(tmp_path, signing={"key": [{"url": hsm.url("hsm-1")}]})))
    said = narseal_command("check-config", "--config", file).stderr
    assert "is not that of its public key" in said


async def test_two_urls_of_one_token_share_its_login(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    items = [entry(f"y{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(3)]
    upstream.add(*items)
    hsm.make("hsm-2", "EC:edwards25519", "09")
    described = hsm.url("hsm-2").replace("token=narseal", f"token=narseal;serial={hsm.serial()}")
    signing = {"key": [{"url": hsm.url("hsm-1")}, {"url": described}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            for item in items:
                status, text = await _asked(session, process, item)
                assert (status, text.count("Sig: hsm-")) == (200, 2)
        hsm.hide_keys()
    assert "UserAlreadyLoggedIn" not in process.log.read_text()


def test_a_token_is_the_one_that_its_url_describes(hsm: SoftHsm, tmp_path: Path) -> None:
    file = tmp_path / "narseal.toml"
    for more, sentence in [
        (f";serial={hsm.serial()};manufacturer=SoftHSM%20project;model=SoftHSM%20v2", ""),
        (";serial=ffffffffffffffff", "no token narseal has serial ffffffffffffffff"),
        (";manufacturer=Nobody", "no token narseal has manufacturer_id Nobody"),
        (";model=None", "no token narseal has model None"),
    ]:
        url = hsm.url("hsm-1").replace("token=narseal", f"token=narseal{more}")
        file.write_text(render_toml(settings(tmp_path, signing={"key": [{"url": url}]})))
        done = narseal_command("check-config", "--config", file)
        assert (done.returncode == 0) == (not sentence), done.stderr
        assert sentence in done.stderr


async def _asked(session: aiohttp.ClientSession, process: Process, item: Entry) -> tuple[int, str]:
    async with session.get(f"{process.url}/{item.hash}.narinfo") as response:
        return response.status, await response.text()


async def test_a_token_goes_and_comes_back_under_load(
    hsm: SoftHsm, tmp_path: Path, upstream: FakeCache
) -> None:
    """Requests get 503 with Retry-After meanwhile; none is served unsigned, all in the end."""
    items = [entry(f"u{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(300)]
    upstream.add(*items)
    signing = {"key": [{"url": hsm.url("hsm-1")}]}
    with narseal_process(tmp_path / "n", {"url": upstream.url}, signing=signing) as process:
        async with aiohttp.ClientSession() as session:
            waiting = iter(items)
            statuses: list[int] = []

            async def read() -> None:
                for item in waiting:
                    while True:
                        async with session.get(f"{process.url}/{item.hash}.narinfo") as response:
                            statuses.append(response.status)
                            if response.status == 200:
                                assert "Sig: hsm-1:" in await response.text()
                                break
                            assert response.status == 503
                            assert response.headers["Retry-After"]
                        await asyncio.sleep(0.05)

            async def away() -> None:
                await asyncio.sleep(0.1)
                tokens, gone = hsm.folder / "tokens", hsm.folder / "gone"
                tokens.rename(gone)
                tokens.mkdir()
                await asyncio.sleep(0.5)
                tokens.rmdir()
                gone.rename(tokens)

            trouble = asyncio.create_task(away())
            await asyncio.gather(*(read() for _ in range(16)))
            await trouble
            assert statuses.count(200) == len(items)


def test_what_is_said_of_a_token_that_cannot_be_used(hsm: SoftHsm, tmp_path: Path) -> None:
    good = hsm.url("hsm-1")
    for url, sentence in [
        (good.replace("object=hsm-1", "object=nobody"), "NoSuchKey"),
        (good.replace("token=narseal", "token=other"), "NoSuchToken"),
        (good.replace(MODULE, "/nowhere.so"), "the token cannot be used"),
        (good.replace(str(hsm.pin_file), "/nowhere"), "/nowhere: cannot be read"),
        (good.replace("object=hsm-1;", "").replace(";object=hsm-1", ""), "object or id"),
        (good + "&key=a%20b", "not a key name"),
        (good + "&pin-value=1234", "a PIN is in a file"),
        ("pkcs11:object=x?module-path=/x", "token is missing"),
        ("pkcs11:token=x;object=x", "module-path is missing"),
    ]:
        file = tmp_path / "narseal.toml"
        file.write_text(render_toml(settings(tmp_path, signing={"key": [{"url": url}]})))
        done = narseal_command("check-config", "--config", file)
        assert done.returncode in (2, 3), (url, done.stderr)
        assert sentence in done.stderr, (url, done.stderr)
        assert "1234" not in done.stderr
        assert hsm.pin not in done.stderr
    hsm.pin_file.chmod(0o644)
    file = tmp_path / "narseal.toml"
    file.write_text(render_toml(settings(tmp_path, signing={"key": [{"url": good}]})))
    assert "lets others read it" in narseal_command("check-config", "--config", file).stderr


def test_token_urls() -> None:
    found = TokenUrl.parse(
        "pkcs11:token=my%20token;id=%01%ff?module-path=/m.so&pin-source=file:/p&key=a-1"
    )
    assert (found.token, found.id, found.label) == ("my token", b"\x01\xff", None)
    assert (found.module, found.pin_file, found.name) == ("/m.so", "/p", "a-1")
    with pytest.raises(ConfigError, match="twice"):
        TokenUrl.parse("pkcs11:token=a;token=b;object=x?module-path=/m")
