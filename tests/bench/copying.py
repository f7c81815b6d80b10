"""`nix copy` of 600 paths by real Nix: warm and cold, beside nginx."""

from __future__ import annotations

import secrets
import time

from tests.bench.closures import built, copy, seconds
from tests.bench.servers import median, nginx
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
    with nix() as builder:
        key, path = built(builder, EXPRESSION)
        cache = builder.folder / "cache"
        ours: dict[str, list[float]] = {"cold": [], "warm": []}
        theirs: dict[str, list[float]] = {"cold": [], "warm": []}
        cores = {0, 1}
        with nginx(f"root {cache};", cores) as static:
            with nginx(f"location / {{ proxy_pass {static}; }}", cores) as relay:
                for round_ in range(3):
                    folder = builder.folder / f"narseal{round_}"
                    with narseal_process(folder, {"url": static, "public_keys": [key]}) as proxy:
                        ours["cold"].append(seconds(copy, proxy.url, proxy.public_key, path))
                        while len(list((folder / "storage").glob("*.narinfo"))) < PATHS:
                            time.sleep(0.05)  # warm is what is published
                        ours["warm"].append(seconds(copy, proxy.url, proxy.public_key, path))
                        ours["warm"].append(seconds(copy, proxy.url, proxy.public_key, path))
                    theirs["cold"].append(seconds(copy, relay, key, path))
                    theirs["warm"].append(seconds(copy, static, key, path))
                    theirs["warm"].append(seconds(copy, static, key, path))
    rows = []
    for state, beside, aim in (("warm", "nginx static", "≤ 1.1"), ("cold", "nginx proxy_pass", "")):
        mine, other = median(ours[state]), median(theirs[state])
        rows.append(
            Row(f"`nix copy` of {PATHS} paths, {state}, against {beside} (time)", f"{mine:.2f} s",
                f"{other:.2f} s", mine / other, aim)
        )  # fmt: skip
    return rows
