"""A closure from far away: real Nix straight from its upstream, and through narseal beside the client."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from yarl import URL

from narseal.nix.narinfo import NarInfo
from narseal.upstream.plain import Client, Place
from tests.bench.closures import built, copy, hash_part, seconds, store
from tests.bench.peers import ncps
from tests.bench.servers import ALL_CORES, HOST, HOST_KEY, NCPS, nginx
from tests.bench.sides import Sides
from tests.bench.table import Row
from tests.tools.narseal import narseal_process
from tests.tools.nix import Nix, nix

_LEVELS, _WIDTH = 20, 30
_PATHS = _LEVELS * _WIDTH + 1
_RETURN = 0.05  # seconds there and back
_JOBS = 16
_STRAIGHT = "the same straight from it"
_AGAIN = "the same again, all of it there: what is left is Nix's own"
_WALK = "its narinfos alone, each asked for as soon as another names it, by a client that does nothing else"
#: The address and port of the line, the same for all sides.
_AT = (HOST, "80") if NCPS else ("127.0.0.1", "0")
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
    sides = Sides()
    ways = {"`nix-store -r`": (_realise, "≤ 0.5"), "`nix copy`": (copy, "≤ 0.1")}
    with nix() as builder:
        path, key = built(builder, _EXPRESSION), str(HOST_KEY.public)
        with nginx(f"root {builder.folder / 'cache'};", ALL_CORES) as near, _far(near) as far:
            for way, (by, _) in ways.items():

                def take(side: str, url: str, key: str, pid: int | None = None) -> None:
                    sides.take(side, way, lambda: seconds(by, url, key, path), pid, _PATHS)

                folder = builder.folder / way.strip("`").replace(" ", "")
                with narseal_process(folder, {"url": far, "public_keys": [key]}) as proxy:
                    take("narseal", proxy.url, proxy.public_key, proxy.workers()[0])
                    take(_AGAIN, proxy.url, proxy.public_key)
                take(_STRAIGHT, far, key)
                sides.take(_WALK, way, lambda: asyncio.run(_walk(far, hash_part(path))))
                with ncps(folder / "ncps", hash_part(path)) as peer:
                    if peer:
                        take("ncps", peer.url, peer.public_key, peer.pid)
    return [
        row
        for way, (_, aim) in ways.items()
        for row in sides.rows(
            f"{way} of {_PATHS} paths, {_LEVELS} levels, cold, upstream {_RETURN * 1000:.0f} ms away",
            way, {_STRAIGHT: aim, _AGAIN: "", _WALK: "", "ncps": aim}, "{:.2f} s", " (time)",
        )
    ]  # fmt: skip


@contextmanager
def _far(url: str) -> Iterator[str]:
    """The same server, far away."""
    parts = urlsplit(url)
    command = [sys.executable, "-m", "tests.tools.delaying_line"]
    line = subprocess.Popen(
        [*command, str(parts.hostname), str(parts.port), str(_RETURN / 2), *_AT],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert line.stdout is not None
        yield f"http://{line.stdout.readline().strip()}"
    finally:
        line.terminate()
        line.communicate()


async def _walk(url: str, root: str) -> float:
    """Seconds until the whole closure is known: there is no quicker way than level by level."""
    client, place = Client(ssl.create_default_context(), connect_timeout=60), Place(URL(url), {})
    seen: set[str] = set()
    start = time.monotonic()

    async def look(hash_part: str) -> None:
        seen.add(hash_part)
        with await client.ask(place, f"/{hash_part}.narinfo") as answer:
            info = NarInfo.parse(await answer.read())
        more = {reference.hash_part for reference in info.references} - seen
        seen.update(more)
        await asyncio.gather(*map(look, more))

    await look(root)
    assert len(seen) == _PATHS
    return time.monotonic() - start


def _realise(client: Nix, url: str, path: str) -> None:
    options = ("--option", "substituters", url, "--option", "max-substitution-jobs", str(_JOBS))
    client.run("nix-store", "--store", store(client), *options, "-r", path)
