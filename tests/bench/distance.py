"""A closure from far away: real Nix straight from its upstream, and through narseal beside the client."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from tests.bench.closures import built, copy, seconds, store
from tests.bench.servers import nginx
from tests.bench.table import Row
from tests.tools.narseal import narseal_process
from tests.tools.nix import Nix, nix

_LEVELS, _WIDTH = 20, 30
_PATHS = _LEVELS * _WIDTH + 1
_RETURN = 0.05  # seconds there and back
_JOBS = 16
_EXPRESSION = f"""
let
  salt = "{secrets.token_hex(8)}";
  sh = name: text: derivation {{
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo ${{text}} ${{salt}} > $out" ];
  }};
  at = list: n: builtins.elemAt list (n - n / {_WIDTH} * {_WIDTH});
  some = list: n: if list == [ ] then "" else toString (map (more: at list (n + more)) [ 0 1 7 ]);
  level = below: number: builtins.genList (n: sh "p-${{toString number}}-${{toString n}}" (some below n)) {_WIDTH};
in sh "all" (toString (builtins.foldl' level [ ] (builtins.genList (n: n) {_LEVELS})))
"""


def measure() -> list[Row]:
    """Seconds for the whole closure into an empty store."""
    rows: list[Row] = []
    with nix() as builder:
        key, path = built(builder, _EXPRESSION)
        with nginx(f"root {builder.folder / 'cache'};", {0, 1}) as near, _far(near) as far:
            for way, take in (("`nix-store -r`", _realise), ("`nix copy`", copy)):
                with narseal_process(
                    builder.folder / f"n{len(rows)}", {"url": far, "public_keys": [key]}
                ) as proxy:
                    ours = seconds(take, proxy.url, proxy.public_key, path)
                theirs = seconds(take, far, key, path)
                rows.append(
                    Row(f"{way} of {_PATHS} paths, {_LEVELS} levels, cold, upstream {_RETURN * 1000:.0f} ms away,"
                        " against the same straight from it (time)", f"{ours:.2f} s", f"{theirs:.2f} s",
                        ours / theirs, "≤ 0.5" if take is _realise else "≤ 0.1")
                )  # fmt: skip
    return rows


@contextmanager
def _far(url: str) -> Iterator[str]:
    """The same server, far away."""
    parts = urlsplit(url)
    command = [sys.executable, "-m", "tests.tools.delaying_line"]
    line = subprocess.Popen(
        [*command, str(parts.hostname), str(parts.port), str(_RETURN / 2)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert line.stdout is not None
        yield f"http://127.0.0.1:{line.stdout.readline().strip()}"
    finally:
        line.terminate()
        line.communicate()


def _realise(client: Nix, url: str, path: str) -> None:
    options = ("--option", "substituters", url, "--option", "max-substitution-jobs", str(_JOBS))
    client.run("nix-store", "--store", store(client), *options, "-r", path)
