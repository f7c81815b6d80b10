"""`nix copy --to` of 600 paths by real Nix, beside nginx's dav module, which checks nothing."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from narseal.custody import tokens
from tests.bench.copying import EXPRESSION, PATHS
from tests.bench.servers import median, nginx
from tests.bench.table import Row
from tests.tools.narseal import narseal_process
from tests.tools.nix import Nix, nix


def measure() -> list[Row]:
    """Seconds for the whole closure, by a client that knows nothing of what is there."""
    ours: list[float] = []
    theirs: list[float] = []
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
                ours.append(_copy(builder, proxy.url, path))
            cache = folder / f"nginx{round_}"
            cache.mkdir()
            body = f"root {cache}; dav_methods PUT; create_full_put_path on;"
            with nginx(f"{body} client_max_body_size 1g;", {0, 1}) as url:
                theirs.append(_copy(builder, url, path))
    mine, other = median(ours), median(theirs)
    what = f"`nix copy --to` of {PATHS} paths, all checked, against nginx's dav (time)"
    return [Row(what, f"{mine:.2f} s", f"{other:.2f} s", mine / other, "≤ 2")]


def _copy(builder: Nix, url: str, path: str) -> float:
    builder.forget()
    builder.run("nix", "--version")
    start = time.monotonic()
    builder.run("nix", "copy", "--to", f"{url}?compression=zstd", path)
    return time.monotonic() - start
