"""Real Nix against a running narseal, trusting nothing but the operator's key."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from narseal.custody import write_private
from tests.tools.cache import key
from tests.tools.changing import logged, write
from tests.tools.command import narseal_command
from tests.tools.narseal import OPERATOR, Process, narseal_process
from tests.tools.nix import Nix, nix
from tests.tools.waiting import until

pytestmark = pytest.mark.real

_PATHS = 320
# the store of the Debian root stays: what is built has to be this run's own, signed by its key
_EXPRESSION = f"""
rec {{
  salt = "{secrets.token_hex(8)}";
  sh = name: args: derivation ({{ inherit name salt; system = "x86_64-linux"; builder = "/bin/sh"; }} // args);
  leaf = n: sh "leaf${{toString n}}" {{ args = ["-c" "echo leaf ${{toString n}} ${{salt}} > $out"]; }};
  node = n: sh "node${{toString n}}" {{ args = ["-c" "echo ${{leaf n}} ${{leaf (n + 1)}} > $out"]; }};
  all = sh "all" {{ args = ["-c" "echo $deps > $out"]; deps = builtins.genList node {_PATHS // 2}; }};
  noisy = sh "noisy" {{ args = ["-c" "echo a line of the log; echo $salt > $out"]; }};
  ca = sh "ca" {{ args = ["-c" "echo ca $salt > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }};
  ca2 = sh "ca2" {{ args = ["-c" "echo ${{ca}} $out > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }};
}}
"""


@dataclass(frozen=True)
class Built:
    """A builder's cache, and what is in it."""

    client: Nix
    public_key: str
    all: str
    closure: list[str]
    noisy: str
    ca2: str


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    """A cache of at least 300 paths, made and signed by real Nix."""
    with nix() as client:
        (client.folder / "d.nix").write_text(_EXPRESSION)
        client.script("nix key generate-secret --key-name builder-1 > key")
        client.config["secret-key-files"] = client.path("key")
        public_key = client.script("nix key convert-secret-to-public < key")
        out = {
            name: client.script(f"nix-build --no-out-link d.nix -A {name} 2>/dev/null")
            for name in ("all", "noisy", "ca2")
        }
        store = f"file://{client.path('cache')}?compression=xz"
        client.script(f"nix copy --to '{store}' {out['all']} {out['noisy']}")
        client.script(f"nix copy --to '{store}' -f d.nix ca2")
        client.script(f"nix store copy-log --to '{store}' -f d.nix noisy")
        closure = client.script(f"nix-store -qR {out['all']}").split()
        assert len(closure) >= 300
        yield Built(client, public_key, out["all"], closure, out["noisy"], out["ca2"])


@pytest.fixture(scope="module")
def proxy(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A narseal with two workers in front of the builder's cache."""
    folder = built.client.folder / "narseal"
    upstream = {"url": f"file://{built.client.folder}/cache", "public_keys": [built.public_key]}
    with narseal_process(folder, upstream, workers=2) as running:
        yield running


@pytest.fixture
def client(proxy: Process) -> Iterator[Nix]:
    """Another machine: an empty store, no cache, only the operator's key."""
    with nix() as fresh:
        fresh.config["trusted-public-keys"] = proxy.public_key
        yield fresh


def store_of(client: Nix) -> str:
    return f"local?root={client.path('store')}"


def test_copy_from_and_verify(client: Nix, proxy: Process, built: Built) -> None:
    store = store_of(client)
    client.run("nix", "copy", "--from", proxy.url, "--to", store, built.all)
    client.run("nix", "store", "verify", "--store", store, "--sigs-needed", "1", "-r", built.all)
    again = client.run("nix-store", "--store", store, "-qR", built.all).split()
    assert sorted(again) == sorted(built.closure)
    # the builder's own signature came along, and is not what was trusted
    client.config["trusted-public-keys"] = str(OPERATOR.public).replace("operator-1", "other-1")
    bad = client.try_run(
        "nix", "store", "verify", "--store", store, "--sigs-needed", "1", "-r", built.all
    )
    assert bad.returncode & 2


def test_substitution_with_only_the_operators_key(
    client: Nix, proxy: Process, built: Built
) -> None:
    client.config |= {"substituters": proxy.url, "require-sigs": "true"}
    out = client.run("nix-store", "-r", built.all, NIX_REMOTE=store_of(client))
    assert out.splitlines()[-1] == built.all
    with nix() as stranger:
        stranger.config |= {
            "substituters": proxy.url,
            "trusted-public-keys": built.public_key.replace("1:", "2:"),
        }
        refused = stranger.try_run("nix-store", "-r", built.noisy, NIX_REMOTE=store_of(stranger))
        assert refused.returncode != 0


def test_path_info_and_verify_over_http(client: Nix, proxy: Process, built: Built) -> None:
    text = client.run("nix", "path-info", "--store", proxy.url, "--json", "-r", built.all)
    infos = json.loads(text)
    assert sorted(infos) == sorted(built.closure)
    for info in infos.values():
        assert any(s.startswith(f"{OPERATOR.name}:") for s in info["signatures"])
    client.run("nix", "store", "verify", "--store", proxy.url, "--sigs-needed", "1", built.all)


def test_build_log(client: Nix, proxy: Process, built: Built) -> None:
    assert "a line of the log" in client.run("nix", "log", "--store", proxy.url, built.noisy)


def test_content_addressed_derivation(client: Nix, proxy: Process, built: Built) -> None:
    (client.folder / "d.nix").write_text(_EXPRESSION)
    client.config |= {"substituters": proxy.url, "require-sigs": "true", "max-jobs": "0"}
    out = client.run(
        "nix",
        "build",
        "--no-link",
        "--print-out-paths",
        "-f",
        client.path("d.nix"),
        "ca2",
        "--store",
        store_of(client),
    )
    assert out.splitlines()[-1] == built.ca2
    client.run("nix", "copy", "--from", proxy.url, "--to", store_of(client), built.ca2)


def test_narseals_own_folder_is_a_plain_binary_cache(
    client: Nix, proxy: Process, built: Built
) -> None:
    client.run("nix", "copy", "--from", proxy.url, "--to", store_of(client), built.all)
    wanted = {f"{path[11:43]}.narinfo" for path in built.closure}
    storage = proxy.folder / "storage"
    until(lambda: wanted <= {p.name for p in storage.glob("*.narinfo")})
    with nix() as other:
        other.config["trusted-public-keys"] = proxy.public_key
        # the folder is seen by Nix below the scratch folder of the builder
        url = "file://" + built.client.path("narseal/storage")
        other.run("nix", "copy", "--from", url, "--to", store_of(other), built.all)
        other.run(
            "nix",
            "store",
            "verify",
            "--store",
            store_of(other),
            "--sigs-needed",
            "1",
            "-r",
            built.all,
        )


def test_interrupted_download_of_100_mb_is_resumed(tmp_path: Path) -> None:
    """The line between narseal and Nix breaks several times: curl goes on by Range."""
    with nix() as builder:
        (builder.folder / "big").write_bytes(os.urandom(100 << 20))
        builder.script("nix key generate-secret --key-name builder-1 > key")
        public_key = builder.script("nix key convert-secret-to-public < key")
        path = builder.script("nix-store --add big")
        builder.script(f"nix store sign -k key {path}")
        builder.script(f"nix copy --to 'file://{builder.path('cache')}?compression=none' {path}")
        upstream = {"url": f"file://{builder.folder}/cache", "public_keys": [public_key]}
        with (
            narseal_process(builder.folder / "narseal", upstream) as proxy,
            cutting_line(proxy.url, tmp_path, every=30_000_000) as line,
            nix() as client,
        ):
            client.config["trusted-public-keys"] = proxy.public_key
            store = store_of(client)
            client.run("nix", "copy", "--from", line.url, "--to", store, path)
            client.run("nix", "store", "verify", "--store", store, "--sigs-needed", "1", path)
            assert line.cuts() >= 3
            copied = client.folder / "store" / path.lstrip("/")
            assert copied.read_bytes() == (builder.folder / "big").read_bytes()


@dataclass(frozen=True)
class Line:
    url: str
    log: Path

    def cuts(self) -> int:
        return self.log.read_text().count("cut")


class cutting_line:
    """A TCP relay that breaks every connection after so many bytes, in a process of its own."""

    def __init__(self, url: str, folder: Path, *, every: int) -> None:
        self.target = url.removeprefix("http://").split(":")
        self.log = folder / "line.log"
        self.every = every

    def __enter__(self) -> Line:
        import sys

        self.log.write_text("")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.cutting_line", *self.target, str(self.every)],
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )
        assert self.process.stdout is not None
        return Line(f"http://127.0.0.1:{self.process.stdout.readline().strip()}", self.log)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_keys_rotate_under_clients_with_the_old_both_and_the_new(
    built: Built, proxy: Process
) -> None:
    """A second key comes, signs what is there, and the first goes; no client sees an error."""
    folder = built.client.folder / "rotating"
    upstream = {"url": f"file://{built.client.folder}/cache", "public_keys": [built.public_key]}
    new = key("rotated-2")
    folder.mkdir()
    write_private(folder / "new.secret", new.render())
    first = {"url": f"file:{folder}/operator.secret"}
    second = {"url": f"file:{folder}/new.secret"}
    trusting = {
        "old": str(OPERATOR.public),
        "both": f"{OPERATOR.public} {new.public}",
        "new": str(new.public),
    }
    with narseal_process(folder, upstream, workers=2, signing={"key": [first]}) as running:

        def copies(*who: str) -> None:
            """Each client installs the closure, all at the same time."""

            def install(name: str) -> None:
                with nix() as other:
                    other.config["trusted-public-keys"] = trusting[name]
                    store = f"local?root={other.path('store')}"
                    other.run("nix", "copy", "--from", running.url, "--to", store, built.all)
                    other.run(
                        "nix", "store", "verify", "--store", store, "-r", "--sigs-needed", "1",
                        built.all,
                    )  # fmt: skip

            with ThreadPoolExecutor(len(who)) as pool:
                list(pool.map(install, who))

        copies("old", "both")
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(copies, "old", "both")
            write(running, upstream, workers=2, signing={"key": [first, second]})
            logged(running, "is in force")
            reading.result()
        until(lambda: " 0 paths lack" in narseal_command("status", "--from", running.url).stdout)
        copies("old", "both", "new")
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(copies, "both", "new")
            write(running, upstream, workers=2, signing={"key": [second]})
            logged(running, "is in force")
            reading.result()
        copies("both", "new")
