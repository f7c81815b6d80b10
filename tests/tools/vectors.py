"""Makes tests/vectors/nix.json with real Nix: `python -m tests.tools.vectors`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tests.tools.nix import Nix, nix

OUTPUT = Path(__file__).parent.parent / "vectors" / "nix.json"

_EXPRESSION = """
rec {
  sh = name: args: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // args);
  dep = sh "dep" { args = ["-c" "echo dep > $out"]; };
  plain = sh "plain" { args = ["-c" "echo ${dep} $out > $out"]; };
  ca = sh "ca" { args = ["-c" "echo ca > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  ca-self = sh "ca-self" { args = ["-c" "echo $out ${ca} $out > $out"]; __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
}
"""
_TREE = """
mkdir -p tree/b tree/empty; printf hello > tree/a; printf '#!/bin/sh\\n' > tree/b/run; chmod +x tree/b/run
ln -s ../a tree/b/link; printf '' > tree/z; printf '12345678' > 'tree/a+b c'
"""


def make(client: Nix) -> dict[str, Any]:
    """Everything that the unit tests compare with, as Nix itself says it."""
    (client.folder / "d.nix").write_text(_EXPRESSION)
    client.script(_TREE)
    client.script("nix key generate-secret --key-name vectors-1 > key")
    secret = (client.folder / "key").read_text()
    client.config["secret-key-files"] = client.path("key")
    public = client.script("nix key convert-secret-to-public < key")
    dump = f"{client.path('.')}/dump"
    client.script(f"nix-store --dump tree > {dump}")
    added = {
        "flat sha256": client.script("nix-store --add-fixed sha256 tree/a"),
        "flat sha1": client.script("nix-store --add-fixed sha1 tree/a"),
        "flat sha512": client.script("nix-store --add-fixed sha512 tree/a"),
        "recursive sha256": client.script("nix-store --add-fixed --recursive sha256 tree"),
        "recursive sha1": client.script("nix-store --add-fixed --recursive sha1 tree"),
        "text": client.script(
            'nix-instantiate --eval --read-write-mode -E \'builtins.toFile "t" "hello"\''
        ).strip('"'),
        "drv": client.script("nix-instantiate d.nix -A plain 2>/dev/null"),
    }
    built = {
        name: client.script(f"nix-build --no-out-link d.nix -A {name} 2>/dev/null")
        for name in ("plain", "ca", "ca-self")
    }
    paths = " ".join([*added.values(), *built.values()])
    client.script(f"nix copy --to 'file://{client.path('cache')}?compression=none' {paths}")
    client.script(
        f"nix copy --to 'file://{client.path('cache')}?compression=none' -f d.nix ca ca-self"
    )
    cache = client.folder / "cache"
    hashes = []
    for algorithm in ("md5", "sha1", "sha256", "sha512"):
        spelled = {
            form: client.script(f"nix hash file --type {algorithm} {flag} tree/a 2>/dev/null")
            for form, flag in (
                ("nix32", "--base32"),
                ("hex", "--base16"),
                ("base64", "--base64"),
                ("sri", "--sri"),
            )
        }
        hashes.append({"algorithm": algorithm} | spelled)
    return {
        "nix": client.version(),
        "secret_key": secret,
        "public_key": public,
        "hashes": hashes,
        "dump": base64.b64encode((client.folder / "dump").read_bytes()).decode(),
        "dump_hash": client.script("nix hash path --type sha256 --base32 tree 2>/dev/null"),
        "added": added,
        "built": built,
        "narinfos": {p.name: p.read_text() for p in sorted(cache.glob("*.narinfo"))},
        "nars": {
            p.name: base64.b64encode(p.read_bytes()).decode() for p in sorted(cache.glob("nar/*"))
        },
        "realisations": {
            str(p.relative_to(cache)): p.read_text()
            for pattern in ("realisations/*", "build-trace-v2/*/*")
            for p in sorted(cache.glob(pattern))
        },
        "cache_info": (cache / "nix-cache-info").read_text(),
    }


if __name__ == "__main__":
    with nix() as client:
        OUTPUT.write_text(json.dumps(make(client), indent=1, sort_keys=True) + "\n")
