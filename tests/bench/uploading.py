"""`nix copy --to` of 600 paths by real Nix, beside nginx's dav module, which checks nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from narseal.custody import tokens
from tests.bench.copying import EXPRESSION, PATHS
from tests.bench.floor import FLOOR, floor
from tests.bench.servers import nginx
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.narseal import UPSTREAM, narseal_process
from tests.tools.nix import Nix, nix


def measure() -> list[Row]:
    """Seconds for the whole closure, by a client that knows nothing of what is there."""
    sides = Sides()
    with nix() as builder, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (builder.folder / "d.nix").write_text(EXPRESSION)
        path = builder.script("nix-build --no-out-link d.nix 2>/dev/null")
        for round_ in range(3):
            home = folder / f"narseal{round_}"
            home.mkdir()
            token = tokens.add(home / "tokens", "bench", allow=("*",), expires=None)[1]
            netrc = builder.folder / "netrc"
            netrc.write_text(f"machine 127.0.0.1 login ci password {token}\n")
            builder.config["netrc-file"] = builder.path("netrc")
            upload = {"enabled": True, "tokens_file": str(home / "tokens")}
            with narseal_process(home, upload=upload) as proxy:
                _take(sides, "narseal", builder, proxy.url, path, proxy.workers()[0])
            with floor("", folder, UPSTREAM.public) as (url, pid, _):
                _take(sides, FLOOR, builder, url, path, pid)
            cache = folder / f"nginx{round_}"
            cache.mkdir()
            body = f"root {cache}; dav_methods PUT; create_full_put_path on;"
            with nginx(f"{body} client_max_body_size 1g;", {0, 1}) as url:
                _take(sides, "nginx's dav", builder, url, path)
    label = f"`nix copy --to` of {PATHS} paths, all checked"
    return sides.rows(label, "upload", {"nginx's dav": "≤ 3", FLOOR: ""}, "{:.2f} s", " (time)")


def _take(
    sides: Sides, side: str, builder: Nix, url: str, path: str, pid: int | None = None
) -> None:
    sides.take(side, "upload", lambda: _copy(builder, url, path), pid, PATHS)


def _copy(builder: Nix, url: str, path: str) -> float:
    builder.forget()
    builder.run("nix", "--version")
    start = time.monotonic()
    builder.run("nix", "copy", "--to", f"{url}?compression=zstd", path)
    return time.monotonic() - start
