"""Closures for real Nix: built and put into a binary cache, and taken into an empty store."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.bench.servers import HOST_KEY
from tests.tools.nix import Nix, nix


def built(builder: Nix, expression: str) -> str:
    """Have a closure in the builder's folder `cache`, signed by HOST_KEY; its path."""
    (builder.folder / "d.nix").write_text(expression)
    (builder.folder / "key").write_text(HOST_KEY.render())
    builder.config["secret-key-files"] = builder.path("key")
    path = builder.script("nix-build --no-out-link d.nix 2>/dev/null")
    builder.script(f"nix copy --to 'file://{builder.path('cache')}?compression=zstd' {path}")
    return path


def seconds(take: Callable[[Nix, str, str], None], url: str, key: str, path: str) -> float:
    """What a client without a cache takes for a path from an address."""
    with nix() as client:
        client.config["trusted-public-keys"] = key
        client.run("nix", "--version")
        start = time.monotonic()
        take(client, url, path)
        return time.monotonic() - start


def copy(client: Nix, url: str, path: str) -> None:
    """By `nix copy`."""
    client.run("nix", "copy", "--from", url, "--to", store(client), path)


def hash_part(path: str) -> str:
    """By which a narinfo is asked for."""
    return path.removeprefix("/nix/store/")[:32]


def store(client: Nix) -> str:
    """An empty one."""
    return f"local?root={client.path('store')}"
