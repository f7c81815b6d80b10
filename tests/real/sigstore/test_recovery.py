"""docs/recovery.md, run as it stands: every command of every section, on a narseal that serves."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from narseal.cosign import statement
from narseal.cosign.keys import CosignKey
from narseal.custody import write_private
from narseal.nix.narinfo import NarInfo
from tests.faults.test_uploads import Uploader, add
from tests.real.sigstore.conftest import IDENTITY
from tests.tools.cache import Entry, entry, key
from tests.tools.narseal import UPSTREAM, Client, render_toml
from tests.tools.ports import free_ports
from tests.tools.signer import SoftHsm
from tests.tools.sigstore import Sigstore
from tests.tools.upstream import FakeCache
from tests.tools.waiting import PATIENCE, eventually

pytestmark = pytest.mark.real

PAGE = (Path(__file__).parents[3] / "docs/recovery.md").read_text()
FIRST = key("cache.example.org-1")
ITEMS = [entry(f"my-app-{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(6)]
UPLOADED = entry("uploaded-1", b"uploaded", compression="zstd")

SYSTEMCTL = """#!/bin/bash
# what systemd does for narseal, for this test
set -e
cd {folder}
start() {{
  setsid narseal serve --config {folder}/narseal.toml >> out 2>> log.jsonl < /dev/null &
  echo $! > pid
  for _ in $(seq 4000); do curl -fs {url}/readyz > /dev/null && return; sleep 0.05; done
  cat log.jsonl >&2; exit 1
}}
stop() {{
  [ -e pid ] || return 0
  kill "$(cat pid)" 2> /dev/null || true
  while kill -0 "$(cat pid)" 2> /dev/null; do sleep 0.05; done
  rm pid
}}
reload() {{
  before=$(grep -c 'is in force' log.jsonl || true)
  kill -HUP "$(cat pid)"
  for _ in $(seq 4000); do
    [ "$(grep -c 'is in force' log.jsonl || true)" -gt "$before" ] && return; sleep 0.05
  done
  cat log.jsonl >&2; exit 1
}}
case "$1" in
  start) start ;; stop) stop ;; restart) stop; start ;; reload) reload ;; *) exit 2 ;;
esac
"""


def sections() -> dict[str, list[str]]:
    """The shell blocks of each section."""
    found: dict[str, list[str]] = {}
    for part in PAGE.split("\n## ")[1:]:
        found[part.partition("\n")[0]] = re.findall(
            r"^```sh\n(.*?)^```", part, re.DOTALL | re.MULTILINE
        )
    return found


class Machine:
    """A machine with narseal on it, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        [self.port] = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "keys").mkdir()
        self._script("narseal", f'#!/bin/sh\nexec {sys.executable} -m narseal "$@"\n')
        self._script("systemctl", SYSTEMCTL.format(folder=folder, url=self.url))
        write_private(folder / "keys/cache.example.org-1.secret", FIRST.render())
        self.token = add(folder)
        (folder / "log.jsonl").touch()
        self.environment: dict[str, str] = {}

    def configure(self, upstream: FakeCache, **more: Any) -> None:
        keys = [{"url": f"file:{self.folder}/keys/cache.example.org-1.secret"}]
        tree = {
            "listen": f"127.0.0.1:{self.port}",
            "workers": 2,
            "storage": {"url": f"file://{self.folder}/cache",
                        "index": f"sqlite:///{self.folder}/index.sqlite"},
            "upload": {"enabled": True, "tokens_file": f"{self.folder}/tokens"},
            "upstream": [{"url": upstream.url, "public_keys": [str(UPSTREAM.public)]}],
            "limits": {"shutdown_timeout": "1s"},
            "signing": {"key": keys},
        } | more  # fmt: skip
        (self.folder / "narseal.toml").write_text(render_toml(tree).replace("[signing]\n", ""))

    def run(self, text: str) -> str:
        """A script of the page, which must work."""
        for there in ("/etc/narseal", "/var/lib/narseal"):
            text = text.replace(there, str(self.folder))
        text = text.replace("http://127.0.0.1:8080", self.url)
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", text], capture_output=True, text=True, timeout=PATIENCE,
            env=os.environ | self.environment | {"PATH": path}, cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    async def section(self, title: str) -> list[str]:
        """Every block of a section, one after another; what each printed."""
        return [await asyncio.to_thread(self.run, block) for block in sections()[title]]

    def _script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "m")
    yield made
    made.run("systemctl stop narseal")


async def begin(machine: Machine, upstream: FakeCache, **more: Any) -> None:
    """Serving, with paths of an upstream and one that was uploaded."""
    upstream.add(*ITEMS)
    machine.configure(upstream, **more)
    await asyncio.to_thread(machine.run, "systemctl start narseal")
    async with aiohttp.ClientSession() as session:
        client = Client(machine.url, session, machine.folder / "cache")
        assert (await Uploader(client, machine.token).path(UPLOADED))[0] == 201
        for item in ITEMS:
            status, body, _ = await client.get(f"{item.hash}.narinfo")
            if status == 200:
                await client.get(NarInfo.parse(body).url)


async def get(machine: Machine, name: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(f"{machine.url}/{name}") as response:
        return response.status, await response.read()


async def signers(machine: Machine, item: Entry) -> set[str]:
    status, body = await get(machine, f"{item.hash}.narinfo")
    assert status == 200, body
    return {s.key_name for s in NarInfo.parse(body).signatures}


def test_every_section_has_commands() -> None:
    assert len(sections()) == 7
    assert all(len(blocks) >= 2 for blocks in sections().values())


async def test_stolen_substituter_key(machine: Machine, upstream: FakeCache) -> None:
    await begin(machine, upstream)
    said = await machine.section("The substituter key was stolen")
    assert "taken off 7 paths, 7 of them signed anew" in said[2]
    assert "cache.example.org-2: signs" in said[4]
    assert "7 of 7 paths verified (content, signature)" in said[4]
    assert await signers(machine, ITEMS[0]) == {"upstream-1", "cache.example.org-2"}
    assert await signers(machine, UPLOADED) == {"cache.example.org-2"}
    config = (machine.folder / "narseal.toml").read_text()
    assert config.count("[[signing.key]]") == 1
    assert "example.org-1.secret" not in config


async def test_stolen_cosign_key(machine: Machine, upstream: FakeCache) -> None:
    old = CosignKey.generate()
    keys = machine.folder / "keys"
    write_private(keys / "cosign.key", old.render(b"secret"))
    (keys / "cosign.pub").write_text(old.public.render())
    write_private(keys / "cosign-password", "secret")
    cosign = {"mode": "key", "key": f"file:{keys}/cosign.key", "password_file": f"{keys}/cosign-password",
              "batch_max_age": "200ms"}  # fmt: skip
    await begin(machine, upstream, cosign=cosign)

    async def signed() -> bool:
        return (await get(machine, f"{UPLOADED.info.url}.sigstore.json"))[0] == 200

    await eventually(signed)
    said = await machine.section("The cosign key was stolen")
    assert re.search(r"[1-9][0-9]* bundles dropped", said[1])
    assert "7 of 7 paths verified (content, attestation)" in said[2]
    status, body = await get(machine, f"attestations/sha256:{UPLOADED.info.nar_hash.digest.hex()}")
    assert status == 200
    assert old.public.hint.encode() not in body
    hint = json.loads(body.splitlines()[0])["verificationMaterial"]["publicKey"]["hint"]
    assert hint != old.public.hint


async def test_compromised_ci_identity(
    machine: Machine, upstream: FakeCache, instance: Sigstore
) -> None:
    rule = {
        "match": "my-app-*", "require": "attestation", "identity": IDENTITY,
        "issuer": instance.issuer.url, "trust_config": str(instance.trust_config_file),
    }  # fmt: skip
    await begin(machine, upstream, policy=[rule])
    (machine.folder / "p.json").write_text("{}")
    write_private(machine.folder / "token", machine.token)

    def attest(item: Entry) -> str:
        digest = f"sha256:{item.info.nar_hash.digest.hex()}"
        machine.environment["TOKEN"] = instance.issuer.token(IDENTITY)
        return machine.run(
            f"narseal attest /nix/store/{item.info.store_path} --digest {digest} --predicate p.json"
            f" --type vuln --keyless --trust-config {instance.trust_config_file}"
            f" --identity-token-env TOKEN --to {machine.url} --token-file token --output {item.hash}"
        )

    await asyncio.to_thread(attest, ITEMS[0])
    await asyncio.sleep(1.5)
    since = datetime.now(UTC).replace(microsecond=0).isoformat()
    await asyncio.sleep(1.1)
    await asyncio.to_thread(attest, ITEMS[1])
    for item in ITEMS[:2]:
        assert (await get(machine, f"{item.hash}.narinfo"))[0] == 200
    machine.environment |= {
        "ISSUER": instance.issuer.url, "SINCE": since,
        "STORE_PATH": f"/nix/store/{ITEMS[1].info.store_path}",
    }  # fmt: skip
    said = await machine.section("A CI identity was compromised")
    assert "1 bundles dropped" in said[0]
    assert "kept back: policy[0]" in said[1]
    assert (await get(machine, f"{ITEMS[0].hash}.narinfo"))[0] == 200  # attested before
    assert (await get(machine, f"{ITEMS[1].hash}.narinfo"))[0] == 403
    # the thief brings it again
    async with aiohttp.ClientSession() as session:
        client = Client(machine.url, session, machine.folder / "cache")
        bundle = (machine.folder / ITEMS[1].hash).read_bytes()
        name = f"attestations/sha256:{ITEMS[1].info.nar_hash.digest.hex()}"
        status, text = await Uploader(client, machine.token).put(name, bundle)
        assert (status, "is revoked since before" in text) == (422, True), text
    assert statement.PREDICATE_TYPE  # narseal's own statements are not concerned


async def test_untrusted_key_of_an_upstream(machine: Machine, upstream: FakeCache) -> None:
    await begin(machine, upstream)
    following = key("upstream-2")
    machine.environment |= {
        "UPSTREAM_KEY": UPSTREAM.public.name, "NEXT_KEY": str(following.public),
    }  # fmt: skip
    revoking, exchanging = sections()["An upstream's key is not to be trusted any more"]
    # taking it out is not enough
    await asyncio.to_thread(machine.run, exchanging)
    assert str(UPSTREAM.public) not in (machine.folder / "narseal.toml").read_text()
    assert await signers(machine, ITEMS[0]) == {"upstream-1", "cache.example.org-1"}
    # that it was not revoked is not passed over
    known, machine.environment["UPSTREAM_KEY"] = machine.environment["UPSTREAM_KEY"], "mistyped-1"
    with pytest.raises(AssertionError, match="no key is called mistyped-1"):
        await asyncio.to_thread(machine.run, revoking)
    machine.environment["UPSTREAM_KEY"] = known
    await asyncio.to_thread(machine.run, revoking)
    for item in ITEMS:
        assert (await get(machine, f"{item.hash}.narinfo"))[0] == 404
    assert await signers(machine, UPLOADED) == {"cache.example.org-1"}
    again = entry("my-app-0", b"0", compression="none").signed(following)
    assert again.info.nar_hash == ITEMS[0].info.nar_hash
    upstream.add(again)

    async def is_back() -> bool:  # that it was refused is remembered for a time, by each worker
        asked = [await get(machine, f"{again.hash}.narinfo") for _ in range(20)]
        return {status for status, *_ in asked} == {200}

    await eventually(is_back)
    assert await signers(machine, again) == {"upstream-2", "cache.example.org-1"}


async def test_lost_token(machine: Machine, upstream: FakeCache, tmp_path: Path) -> None:
    folder = tmp_path / "hsm"
    folder.mkdir()
    hsm = SoftHsm(folder)
    machine.environment |= hsm.environment
    await begin(machine, upstream, signing={"key": [{"url": hsm.url("hsm-1")}]})
    assert await signers(machine, ITEMS[0]) == {"upstream-1", "hsm-1"}
    (folder / "tokens").rename(folder / "lost")
    await machine.section("The hardware token is lost")
    assert await signers(machine, ITEMS[0]) == {"upstream-1", "hsm-1", "cache.example.org-3"}
    assert await signers(machine, UPLOADED) == {"hsm-1", "cache.example.org-3"}


async def test_index_from_a_backup(machine: Machine, upstream: FakeCache) -> None:
    third = key("cache.example.org-3")
    write_private(machine.folder / "keys/cache.example.org-3.secret", third.render())
    keys = [{"url": f"file:{machine.folder}/keys/cache.example.org-{n}.secret"} for n in (1, 3)]
    await begin(machine, upstream, signing={"key": keys})
    blocks = sections()["The index was lost, or comes from a backup"]
    await asyncio.to_thread(machine.run, blocks[0])
    # after the backup: an upload that nobody else has, and a revocation
    late = entry("late-1", b"late", compression="zstd")
    async with aiohttp.ClientSession() as session:
        client = Client(machine.url, session, machine.folder / "cache")
        assert (await Uploader(client, machine.token).path(late))[0] == 201
    await asyncio.to_thread(
        machine.run,
        "narseal revoke cache.example.org-1 --reason stolen --config /etc/narseal/narseal.toml",
    )
    await asyncio.to_thread(machine.run, blocks[1])
    said = await asyncio.to_thread(machine.run, blocks[2])
    assert "put back 1 paths, 0 could not be" in said
    assert said.rstrip().endswith("good")
    for item in (late, UPLOADED):
        assert await signers(machine, item) == {"cache.example.org-3"}
    # and with no backup at all, when the stolen key is in no configuration any more
    removing = sections()["The substituter key was stolen"][3]
    assert "rm /var/lib/narseal/keys/cache.example.org-1.secret" in removing
    await asyncio.to_thread(machine.run, removing)
    await asyncio.to_thread(machine.run, blocks[1].replace("cp ", "true ") + blocks[2])
    for item in (late, UPLOADED, *ITEMS):
        assert "cache.example.org-3" in await signers(machine, item)
        assert "cache.example.org-1" not in await signers(machine, item)


async def test_lost_folder(machine: Machine, upstream: FakeCache) -> None:
    await begin(machine, upstream)
    await asyncio.to_thread(machine.run, "systemctl stop narseal")
    (machine.folder / "cache").rename(machine.folder / "lost")
    said = await machine.section("The storage folder is not there, or was lost")
    assert "1 problems" in said[0]
    assert "joined: 0 of 7 stored NARs" in said[1]
    for item in ITEMS:
        assert (await get(machine, item.info.url))[1] == item.file

    async def withdrawn() -> bool:
        return (await get(machine, f"{UPLOADED.hash}.narinfo"))[0] == 404

    await get(machine, UPLOADED.info.url)
    await eventually(withdrawn)
