"""`narseal index …`."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from narseal.cli.load import config_option, load
from narseal.config import Config
from narseal.errors import NarsealError, Unavailable
from narseal.nix.keys import PublicKey

if TYPE_CHECKING:
    from narseal.nix.cache_info import CacheInfo


@click.group()
def index() -> None:
    """Look after the index of what is in storage."""


@index.command()
@config_option
@click.option("--content", is_flag=True, help="Hash every NAR file too.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def check(config_file: Path, content: bool, as_json: bool) -> None:
    """Compare the index with what is in storage; changes nothing, also while narseal serves."""
    found = _check(load(config_file), content=content)
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

    For a lost index, one from an older backup, or one that counts wrongly: it counts its rows anew.
    narseal must not run. Each file is hashed; a path is
    taken on the word of keys of yours that are not revoked. The narinfos of what is refused are moved
    to .narseal/refused in the folder, and looked at again the next time; what cannot be read now stays
    where it is. Attestations that others left are verified and taken again. Exit code 1 if anything was not put back.
    """
    config = load(config_file)
    made = asyncio.run(_rebuild(config))
    done, failed = made.done, made.failed
    for name, why in failed:
        click.echo(f"not put back: {name}: {why}", err=True)
    folder = config.storage.url.removeprefix("file://")
    if failed:
        refused = sum(not isinstance(why, Unavailable) for _, why in failed)
        click.echo(f"put back {done or 'no'} paths, {len(failed)} could not be")
        if refused:
            click.echo(
                f"the narinfos of {refused} that were refused are in {folder}/.narseal/refused"
            )
        if refused < len(failed):
            click.echo(
                f"{len(failed) - refused} could not be looked at and stay in the folder: see to what"
                " is said of them, then run it again",
                err=True,
            )
        if refused and not done:
            click.echo(
                "are the [[signing.key]] those that signed them? then run it again", err=True
            )
    elif done:
        click.echo(f"put back {done} paths, 0 could not be")
    elif made.there:
        click.echo(f"nothing to put back: the index has all {made.there} paths of {folder}")
    else:
        click.echo(f"nothing to put back: {folder} has no narinfos. Is that the right folder?")
    if made.attested:
        click.echo(f"took {made.attested} attestations again that others had left")
    if made.orphans:
        click.echo(
            f"{len(made.orphans)} NAR files have no narinfo, {made.orphans[0]} for one: uploads that"
            " policy kept back; bring them again",
            err=True,
        )
    sys.exit(1 if failed else 0)


@index.command()
@config_option
def join(config_file: Path) -> None:
    """Let the index have the storage folder as it is: its files were lost, or moved without .narseal.

    narseal must not run. What the folder lacks is fetched again when it is asked for; uploads that it
    lacks are withdrawn then.
    """
    from narseal.storage import LocalStorage, take

    config = load(config_file)
    storage = LocalStorage(config.storage.url)
    there, stored = take(config.storage.index, storage, _cache_info(config))
    click.echo(f"joined: {there} of {stored} stored NARs are in {storage.root}")


@index.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@config_option
def backup(file: Path, config_file: Path) -> None:
    """Copy the index into FILE, also while narseal serves."""
    from narseal.storage import backup as copy

    copy(load(config_file).storage.index, file)
    click.echo(f"wrote {file}")


def _check(config: Config, *, content: bool) -> list[str]:
    from narseal.pipeline.upkeep.check import Subject, problems
    from narseal.storage import Epoch, LocalStorage, migrate_present

    url = config.storage.index
    migrate_present(url)
    keys = _public_keys(config)
    storage = LocalStorage(config.storage.url, Epoch.of(url).mark or None)  # None: not joined yet
    return list(problems(Subject(url, config.store_dir, storage, keys, content)))


@dataclass
class _Rebuilt:
    """What became of an index that was rebuilt."""

    #: Paths that were put back, and narinfos that were not, with why.
    done: int = 0
    failed: list[tuple[str, NarsealError]] = field(default_factory=list)
    #: Narinfos of the folder afterwards.
    there: int = 0
    #: Attestations that were taken again.
    attested: int = 0
    #: NAR files that nothing names.
    orphans: list[str] = field(default_factory=list)


async def _rebuild(config: Config) -> _Rebuilt:
    from narseal.pipeline.substituter import Substituter
    from narseal.storage import Epoch, LocalStorage, join_for_rebuild

    _public_keys(config)  # before anything is written, see that they can be used
    locked = LocalStorage(config.storage.url)  # for as long as it lives
    join_for_rebuild(config.storage.index, locked, _cache_info(config))
    made = _Rebuilt()
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        made.attested = await substituter.provenance.put_back()  # before policy asks for them
        async for name, error in substituter.rebuilding.run():
            if error:
                made.failed.append((name, error))
            else:
                made.done += 1
        made.orphans = await substituter.rebuilding.orphans()
    made.there = len(locked.narinfos())
    return made


def _cache_info(config: Config) -> CacheInfo:
    from narseal.nix.cache_info import CacheInfo

    return CacheInfo(config.store_dir, want_mass_query=True, priority=config.priority)


def _public_keys(config: Config) -> dict[str, PublicKey]:
    from narseal.pipeline.services import load_keys

    keys = load_keys(config)
    for key in keys:
        key.custodian.close()
    return {key.public.name: key.public for key in keys}
