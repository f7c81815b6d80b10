"""`make serve`: narseal on its embedded default, in front of a sample cache or a real one.

Makes, once, below `.narseal/`: an operator key, a configuration, and (without --upstream) a
small binary cache whose own key is another. Then it becomes `narseal serve`.
"""

from __future__ import annotations

import argparse
import lzma
import os
import sys
from pathlib import Path

from narseal.cosign.keys import CosignKey
from narseal.custody import FileKey, write_private
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.keys import SecretKey
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import References, StorePath

HERE = Path.cwd() / ".narseal"
KNOWN_KEYS = {
    "https://cache.nixos.org": "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
}


def main() -> None:
    """Set everything up that is not there yet, and serve."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--upstream", help="a real cache, such as https://cache.nixos.org")
    arguments.add_argument("--public-key", help="its public key, unless it is a known one")
    arguments.add_argument("--listen", default="127.0.0.1:8080")
    given = arguments.parse_args()
    HERE.mkdir(exist_ok=True)
    operator = operator_key(HERE / "operator.secret")
    cosign_key(HERE / "cosign.key")
    if given.upstream:
        url = given.upstream.rstrip("/")
        public_key = given.public_key or KNOWN_KEYS.get(url)
        if not public_key:
            sys.exit(f"name the key of {url}: make serve UPSTREAM={url} PUBLIC_KEY=name:base64")
        folder = HERE / "".join(c if c.isalnum() else "-" for c in url)
    else:
        url, public_key, path = sample_cache(HERE / "sample")
        folder = HERE / "default"
        print_sample(given.listen, path, operator)
        print_cosign(given.listen, HERE / "sample", path)
    folder.mkdir(exist_ok=True)
    config = folder / "narseal.toml"
    config.write_text(
        f'listen = "{given.listen}"\n\n'
        f'[[upstream]]\nurl = "{url}"\npublic_keys = ["{public_key}"]\n\n'
        f'[storage]\nurl = "file://{folder}/cache"\n'
        f'index = "sqlite:///{folder}/index.sqlite"\n\n'
        f'[[signing.key]]\nurl = "file:{HERE}/operator.secret"\n\n'
        f'[cosign]\nmode = "key"\nkey = "file:{HERE}/cosign.key"\nbatch_max_age = "3s"\n'
    )
    program = str(Path(sys.executable).parent / "narseal")
    os.execv(program, [program, "serve", "--config", str(config)])


def operator_key(file: Path) -> FileKey:
    """The operator's key, made at the first start."""
    if not file.exists():
        write_private(file, SecretKey.from_seed("narseal-demo-1", os.urandom(32)).render())
    return FileKey.load(f"file:{file}")


def cosign_key(file: Path) -> None:
    """The key pair for Sigstore signatures, made at the first start, with an empty password."""
    if not file.exists():
        key = CosignKey.generate()
        write_private(file, key.render(b""))
        file.with_suffix(".pub").write_text(key.public.render())


def sample_cache(folder: Path) -> tuple[str, str, StorePath]:
    """A binary cache with two signed paths; its URL, its public key, and the path to try."""
    secret = SecretKey.from_seed("sample-upstream-1", bytes(32))
    (folder / "nar").mkdir(parents=True, exist_ok=True)
    (folder / "nix-cache-info").write_text("StoreDir: /nix/store\nWantMassQuery: 1\n")
    text = add(folder, secret, "greeting", nar.Regular(b"Hello from narseal's sample cache.\n"), ())
    script = f"#!/bin/sh\ncat {text.full('/nix/store')}\n".encode()
    tree = nar.Directory({b"bin": nar.Directory({b"greet": nar.Regular(script, executable=True)})})
    return f"file://{folder}", str(secret.public), add(folder, secret, "greet", tree, (text,))


def add(
    folder: Path, secret: SecretKey, name: str, node: nar.Node, references: tuple[StorePath, ...]
) -> StorePath:
    """Write one content-addressed, signed path into the cache."""
    data = b"".join(nar.render(node))
    file = lzma.compress(data)
    address = ContentAddress(Method.NAR, Hash.sha256(data))
    path = address.store_path(name, references, self_hash="", store_dir="/nix/store")
    assert path is not None
    url = f"nar/{Hash.sha256(file).nix32}.nar.xz"
    info = NarInfo(
        store_dir="/nix/store",
        store_path=path,
        url=url,
        compression="xz",
        nar_hash=Hash.sha256(data),
        nar_size=len(data),
        file_hash=Hash.sha256(file),
        file_size=len(file),
        references=References(references),
        ca=address,
    )
    info = info.with_signatures((secret.sign(info.fingerprint()),))
    (folder / url).write_bytes(file)
    (folder / f"{path.hash_part}.narinfo").write_bytes(info.render())
    return path


def print_sample(listen: str, path: StorePath, operator: FileKey) -> None:
    """Two lines to try."""
    full = path.full("/nix/store")
    print(
        "A sample cache stands behind narseal. When it serves, try\n\n"
        f"    curl http://{listen}/{path.hash_part}.narinfo\n\n"
        f"    nix --extra-experimental-features nix-command copy --from http://{listen} \\\n"
        f"      --to 'local?root=/tmp/narseal-try' --option trusted-public-keys \\\n"
        f"      '{operator.public}' {full}\n",
        flush=True,
    )


def print_cosign(listen: str, cache: Path, path: StorePath) -> None:
    """Three lines that need no Nix; the signature is there some seconds after the NAR was."""
    info = NarInfo.parse((cache / f"{path.hash_part}.narinfo").read_bytes())
    file = info.url.removeprefix("nar/")
    print(
        f"    curl -sO http://{listen}/{path.hash_part}.narinfo -O http://{listen}/nar/{file}\n"
        f"    sleep 5; curl -fsSO http://{listen}/nar/{file}.sigstore.json\n"
        f"    cosign verify-blob --key {HERE}/cosign.pub --insecure-ignore-tlog \\\n"
        f"      --bundle {file}.sigstore.json {file}\n",
        flush=True,
    )


if __name__ == "__main__":
    main()
