"""`nix copy` of 600 paths by real Nix: warm and cold, beside nginx and the peers."""

from __future__ import annotations

import secrets
import time

from tests.bench.closures import built, copy, hash_part, seconds
from tests.bench.floor import FLOOR, floor
from tests.bench.peers import harmonia, ncps
from tests.bench.servers import ALL_CORES, AT_HOST, HOST_KEY, nginx
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.narseal import narseal_process
from tests.tools.nix import nix

PATHS = 600
EXPRESSION = f"""
let salt = "{secrets.token_hex(8)}"; sh = name: args: derivation {{ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = ["-c" args]; }};
in sh "all" ("echo " + toString (builtins.genList (n: sh "p${{toString n}}" "echo ${{toString n}} ${{salt}} > $out") {PATHS - 1}) + " > $out")
"""


def measure() -> list[Row]:
    """Seconds for the whole closure into an empty store, by a client without a cache."""
    sides = Sides()

    def take(side: str, state: str, url: str, key: str, pid: int | None = None) -> None:
        for _ in range(2 if state == "warm" else 1):
            sides.take(side, state, lambda: seconds(copy, url, key, path), pid, PATHS)

    with nix() as builder:
        path, key = built(builder, EXPRESSION), str(HOST_KEY.public)
        with (
            nginx(f"root {builder.folder / 'cache'}; {AT_HOST}", ALL_CORES) as static,
            nginx(f"location / {{ proxy_pass {static}; }}", ALL_CORES) as relay,
            harmonia(static, path) as local,
        ):
            for round_ in range(3):
                folder = builder.folder / f"narseal{round_}"
                with narseal_process(folder, {"url": static, "public_keys": [key]}) as proxy:
                    us = (proxy.url, proxy.public_key, proxy.workers()[0])
                    take("narseal", "cold", *us)
                    while len(list((folder / "storage").glob("*.narinfo"))) < PATHS:
                        time.sleep(0.05)  # warm is what is published
                    take("narseal", "warm", *us)
                take("nginx proxy_pass", "cold", relay, key)
                with floor(static, builder.folder, HOST_KEY.public) as (url, pid, floors_key):
                    take(FLOOR, "cold", url, floors_key, pid)
                    take(FLOOR, "warm", url, floors_key, pid)
                take("nginx static", "warm", static, key)
                with ncps(builder.folder / f"ncps{round_}", hash_part(path)) as peer:
                    if peer:
                        take("ncps", "cold", peer.url, peer.public_key, peer.pid)
                        take("ncps", "warm", peer.url, peer.public_key, peer.pid)
                if local:
                    take("harmonia", "warm", local.url, local.public_key, local.pid)
    label, form = f"`nix copy` of {PATHS} paths", "{:.2f} s"
    warm = {"nginx static": "≤ 0.8", FLOOR: "", "ncps": "< 1", "harmonia": "< 1"}
    cold = {"nginx proxy_pass": "≤ 1.5", FLOOR: "", "ncps": "≤ 0.5"}
    return [
        *sides.rows(f"{label}, warm", "warm", warm, form, " (time)"),
        *sides.rows(f"{label}, cold", "cold", cold, form, " (time)"),
    ]
