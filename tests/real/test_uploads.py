"""Real Nix uploads: `nix copy --to`, logs, realisations, signatures; another store installs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from narseal.cosign.keys import CosignKey
from narseal.custody import tokens, write_private
from tests.tools import debian
from tests.tools.command import narseal_command
from tests.tools.narseal import Process, narseal_process
from tests.tools.nix import Nix, nix

pytestmark = pytest.mark.real

_EXPRESSION = f"""
rec {{
  salt = "{secrets.token_hex(8)}";
  sh = name: args: derivation ({{ inherit name salt; system = "x86_64-linux"; builder = "/bin/sh"; }} // args);
  leaf = n: sh "leaf${{toString n}}" {{ args = ["-c" "echo leaf ${{toString n}} ${{salt}} > $out"]; }};
  node = n: sh "node${{toString n}}" {{ args = ["-c" "echo ${{leaf n}} ${{leaf (n + 1)}} > $out"]; }};
  all = sh "all" {{ args = ["-c" "echo $deps > $out"]; deps = builtins.genList node 155; }};
  app = sh "app" {{ args = ["-c" "echo app $salt > $out"]; }};
  one = kind: sh "one-${{kind}}" {{ args = ["-c" "echo one ${{kind}} $salt > $out"]; }};
  zstd = one "zstd"; xz = one "xz"; none = one "none"; br = one "br"; plain = one "plain"; signed = one "signed";
  debug = sh "debug" {{ PATH = "/bin:/usr/bin"; args = ["-c" "mkdir -p $out/lib/debug/.build-id/02; echo x $salt > $out/lib/debug/.build-id/02/62ca01fc0b2a1b3e0ee3d2b1dcee3a4e9fd1a6.debug"]; }};
  noisy = sh "noisy" {{ args = ["-c" "echo a line of the log; echo $salt > $out"]; }};
  ca = sh "ca" {{ args = ["-c" "echo ca $salt > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }};
  ca2 = sh "ca2" {{ args = ["-c" "echo ${{ca}} $out > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; }};
}}
"""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A narseal without any upstream: all that it has was uploaded."""
    folder = tmp_path_factory.mktemp("uploads")
    token = tokens.add(folder / "tokens", "ci", allow=("*",), expires=None)[1]
    upload = {"enabled": True, "tokens_file": str(folder / "tokens")}
    ci = CosignKey.generate()
    write_private(folder / "ci.key", ci.render(b""))
    write_private(folder / "token", token)
    (folder / "ci.pub").write_text(ci.public.render())
    rule = {
        "match": "app", "require": "attestation", "cosign_key": f"{folder}/ci.pub",
        "predicate_types": ["slsaprovenance1"],
    }  # fmt: skip
    with narseal_process(folder, upload=upload, workers=2, policy=[rule]) as process:
        yield process


@pytest.fixture
def client(proxy: Process) -> Iterator[Nix]:
    """A builder with a netrc."""
    with nix() as client:
        (client.folder / "d.nix").write_text(_EXPRESSION)
        token = (proxy.folder / "token").read_text()
        (client.folder / "netrc").write_text(f"machine 127.0.0.1 login ci password {token}\n")
        client.config["netrc-file"] = client.path("netrc")
        yield client


def build(client: Nix, name: str) -> str:
    return client.script(f"nix-build --no-out-link d.nix -A {name} 2>/dev/null")


def install(proxy: Process, path: str) -> str:
    """Substitution into another store, by a client that trusts only the operator; no token."""
    with nix() as other:
        other.config["trusted-public-keys"] = proxy.public_key
        other.config["substituters"] = proxy.url
        store = f"local?root={other.path('store')}"
        other.run("nix-store", "--store", store, "-r", path)
        other.run("nix", "store", "verify", "--store", store, "-r", "--sigs-needed", "1", path)
        return other.run("nix", "path-info", "--store", store, "-r", path)


@pytest.mark.parametrize("compression", ["zstd", "xz", "none", "br"])
def test_copy_to_and_install_elsewhere(client: Nix, proxy: Process, compression: str) -> None:
    path = build(client, compression)
    store = f"{proxy.url}?compression={compression}&write-nar-listing=true&ls-compression=br&narinfo-compression=zstd"
    client.run("nix", "copy", "--to", store, path)
    assert path in install(proxy, path)
    hash_part = path.removeprefix("/nix/store/")[:32]
    assert (proxy.folder / f"storage/{hash_part}.ls").read_bytes().startswith(b'{"')
    # again, by one who does not know that it is there
    client.forget()
    client.run("nix", "copy", "--to", f"{proxy.url}?compression={compression}", path)


def test_closure_of_more_than_300_paths(client: Nix, proxy: Process) -> None:
    path = build(client, "all")
    client.run("nix", "copy", "--to", f"{proxy.url}?compression=zstd", path)
    assert len(install(proxy, path).split()) > 300


def test_kept_back_until_attested(client: Nix, proxy: Process, tmp_path: Path) -> None:
    """Below /upload/, then kept back from Nix, then attested by its NAR as it is in the store."""
    path = build(client, "app")
    client.run("nix", "copy", "--to", f"{proxy.url}/upload?compression=zstd", path)
    with nix() as other:
        other.config["trusted-public-keys"] = proxy.public_key
        fetch = ["nix", "copy", "--from", proxy.url, "--to",
                 f"local?root={other.path('store')}", path]  # fmt: skip
        assert other.try_run(*fetch).returncode != 0
        dumped = client.script(f"nix-store --dump {path} | sha256sum").split()[0]
        (tmp_path / "p.json").write_text("{}")
        done = narseal_command(
            "attest", path, "--digest", f"sha256:{dumped}", "--predicate", tmp_path / "p.json",
            "--type", "slsaprovenance1", "--key", proxy.folder / "ci.key", "--to", proxy.url,
            "--token-file", proxy.folder / "token",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        other.forget()
        other.run(*fetch)
    # copying again finds it there
    client.forget()
    client.run("nix", "copy", "--to", f"{proxy.url}/upload?compression=zstd", path)


def test_debug_info(client: Nix, proxy: Process) -> None:
    path = build(client, "debug")
    client.run("nix", "copy", "--to", f"{proxy.url}?compression=zstd&index-debug-info=true", path)
    pointer = proxy.folder / "storage/debuginfo/0262ca01fc0b2a1b3e0ee3d2b1dcee3a4e9fd1a6.debug"
    assert b"../nar/" in pointer.read_bytes()


def test_build_log(client: Nix, proxy: Process) -> None:
    path = build(client, "noisy")
    client.run("nix", "copy", "--to", proxy.url, path)
    for how in ("none", "br", "zstd", "xz"):
        to = f"{proxy.url}?log-compression={how}"
        client.run("nix", "store", "copy-log", "--to", to, "-f", str(client.path("d.nix")), "noisy")
        [lies] = (proxy.folder / "storage/log").iterdir()
        assert b"a line of the log" in lies.read_bytes()  # decoded, as Nix reads it from a folder
        with nix() as other:
            assert other.run("nix", "log", "--store", proxy.url, path) == "a line of the log"
        lies.unlink()


def test_content_addressed_realisations(client: Nix, proxy: Process) -> None:
    build(client, "ca2")
    expression = str(client.path("d.nix"))
    client.run("nix", "copy", "--to", proxy.url, "-f", expression, "ca2")
    with nix() as other:
        other.config["trusted-public-keys"] = proxy.public_key
        other.config["substituters"] = proxy.url
        (other.folder / "d.nix").write_text(_EXPRESSION)
        store = f"local?root={other.path('store')}"
        built = other.run(
            "nix", "build", "--store", store, "-j0", "--no-link", "--print-out-paths", "-f",
            other.path("d.nix"), "ca2",
        )  # fmt: skip
        assert built.startswith("/nix/store/")


def test_signatures_are_added(client: Nix, proxy: Process) -> None:
    path = build(client, "signed")
    client.run("nix", "copy", "--to", proxy.url, path)
    client.script("nix key generate-secret --key-name second-1 > key")
    client.forget()
    client.run("nix", "store", "sign", "--store", proxy.url, "-k", client.path("key"), path)
    with nix() as other:
        info = other.run("nix", "path-info", "--store", proxy.url, "--sigs", path)
        assert "second-1:" in info
        assert proxy.public_key.partition(":")[0] in info


def test_an_old_nix_uploads_and_installs(proxy: Process) -> None:
    """2.8, of Debian bookworm: another order of PUTs, other headers."""
    with nix(debian.OLD_ROOT) as old:
        assert old.version().startswith("2.8")
        (old.folder / "d.nix").write_text(_EXPRESSION.replace('salt = "', 'salt = "old-'))
        token = (proxy.folder / "token").read_text()
        (old.folder / "netrc").write_text(f"machine 127.0.0.1 login ci password {token}\n")
        old.config["netrc-file"] = old.path("netrc")
        path = build(old, "zstd")
        old.run("nix", "copy", "--to", f"{proxy.url}?compression=xz&write-nar-listing=true", path)
        old.script(f"nix store copy-log --to '{proxy.url}' {path}")
        assert path in install(proxy, path)
        old.forget()
        old.config["trusted-public-keys"] = proxy.public_key
        old.config["substituters"] = proxy.url
        store = f"local?root={old.path('store')}"
        old.run("nix-store", "--store", store, "-r", path)


def test_without_a_token_nix_says_what_to_do(client: Nix, proxy: Process) -> None:
    path = build(client, "plain")
    del client.config["netrc-file"]
    result = client.try_run("nix", "copy", "--to", proxy.url, path)
    assert result.returncode != 0
    assert "netrc" in result.stderr
