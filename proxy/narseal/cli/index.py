"""`narseal index …`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from narseal.cli.load import config_option, load
from narseal.config import Config
from narseal.nix.keys import PublicKey

if TYPE_CHECKING:
    from narseal.storage import Index


@click.group()
def index() -> None:
    """Look after the index of what is in storage."""


@index.command()
@config_option
@click.option("--content", is_flag=True, help="Hash every NAR file too.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def check(config_file: Path, content: bool, as_json: bool) -> None:
    """Compare the index with what is in storage; changes nothing, also while narseal serves."""
    found = asyncio.run(_check(load(config_file), content=content))
    if as_json:
        click.echo(json.dumps({"problems": found}))
    else:
        for sentence in found:
            click.echo(sentence, err=True)
        click.echo(f"{len(found)} problems" if found else "good")
    sys.exit(1 if found else 0)


@index.command()
@config_option
def rebuild(config_file: Path) -> None:
    """Put back into the index what the storage folder has and the index has not.

    For a lost index, or one from an older backup; narseal must not run. Each file is hashed; a path is
    taken on the word of a key of yours that is not revoked.
    """
    done, failed = asyncio.run(_rebuild(load(config_file)))
    for name, why in failed:
        click.echo(f"not put back: {name}: {why}", err=True)
    click.echo(f"put back {done} paths, {len(failed)} could not be")
    sys.exit(1 if failed else 0)


@index.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@config_option
def backup(file: Path, config_file: Path) -> None:
    """Copy the index into FILE, also while narseal serves."""
    from narseal.storage import backup as copy

    copy(load(config_file).storage.index, file)
    click.echo(f"wrote {file}")


@asynccontextmanager
async def _opened(config: Config) -> AsyncIterator[Index]:
    from narseal.storage import Index

    opened = Index(config.storage.index, config.store_dir)
    async with asyncio.TaskGroup() as group:
        group.create_task(opened.run())
        try:
            yield opened
        finally:
            await opened.close()


async def _check(config: Config, *, content: bool) -> list[str]:
    from narseal.pipeline.upkeep.check import problems
    from narseal.storage import LocalStorage, migrate_present

    migrate_present(config.storage.index)
    keys = _public_keys(config)
    async with _opened(config) as opened:
        storage = LocalStorage(config.storage.url)
        return [sentence async for sentence in problems(opened, storage, keys, content=content)]


async def _rebuild(config: Config) -> tuple[int, list[tuple[str, str]]]:
    from narseal.nix.cache_info import CacheInfo
    from narseal.nix.keyring import KeyRing
    from narseal.pipeline.upkeep.rebuild import Rebuilding
    from narseal.runtime.threads import ThreadPools
    from narseal.storage import LocalStorage, migrate

    storage = LocalStorage(config.storage.url)
    storage.prepare(CacheInfo(config.store_dir, want_mass_query=True, priority=config.priority))
    threads = ThreadPools(transfers=2)
    done, failed = 0, []
    keys = _public_keys(config)
    migrate(config.storage.index)
    async with _opened(config) as opened:
        pinned = KeyRing.of(
            *(upstream.public_keys for upstream in config.upstream), config.upload.trusted_keys
        )
        ring = KeyRing.of(keys.values())
        work = Rebuilding(index=opened, storage=storage, keys=ring, pinned=pinned, threads=threads)
        async for name, error in work.run():
            if error:
                failed.append((name, str(error)))
            else:
                done += 1
    threads.close()
    return done, failed


def _public_keys(config: Config) -> dict[str, PublicKey]:
    from narseal.pipeline.services import load_keys

    keys = load_keys(config)
    for key in keys:
        key.custodian.close()
    return {key.public.name: key.public for key in keys}
