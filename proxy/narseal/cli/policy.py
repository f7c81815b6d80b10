"""`narseal policy …`: try the rules, and take them over from a ClusterImagePolicy."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from narseal.cli.load import config_option, load
from narseal.config import Config
from narseal.errors import MalformedStorePath, NarsealError, Trouble
from narseal.nix.store_path import StorePath


@click.group()
def policy() -> None:
    """Try and import the rules of what may be served."""


@policy.command()
@click.argument("paths", nargs=-1, required=True)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each path.")
def test(paths: tuple[str, ...], config_file: Path, as_json: bool) -> None:
    """Say which rule of the configuration decides about store PATHS, and why.

    It looks at what is in the index, else at the upstreams; it signs and changes nothing.
    Exit code 1 if one is kept back, or is to be had nowhere; 3 if that could not be found out.
    """
    config, store_paths = load(config_file), [_store_path(path) for path in paths]
    codes = []
    for store_path, found in asyncio.run(_statuses(config, store_paths)):
        said = _Said.of(f"{config.store_dir}/{store_path}", found)
        codes.append(said.code)
        if as_json:
            click.echo(json.dumps(said.tree))
        else:
            click.echo(said.sentence, err=said.failed)
    sys.exit(max(codes))


@dataclass(frozen=True, slots=True)
class _Said:
    """What is said of one path."""

    tree: dict[str, Any]
    sentence: str
    code: int
    #: It is about no rule: there is no such path, or nobody could say.
    failed: bool = False

    @classmethod
    def of(cls, path: str, found: dict[str, Any] | NarsealError) -> _Said:
        """Of a status, or of why there is none."""
        if isinstance(found, NarsealError):
            word = "not known" if isinstance(found, Trouble) else "no rule was asked"
            tree = {"storePath": path, "error": str(found), "reason": found.reason}
            return cls(tree, f"{path}: {word}: {found}", found.exit_code, failed=True)
        verdict = found["policy"]
        word = "served" if verdict["allowed"] else "kept back"
        sentence = f"{path}: {word}: {verdict['rule']}: {verdict['why']}"
        return cls({"storePath": path, **verdict}, sentence, 0 if verdict["allowed"] else 1)


@policy.command("import")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--match",
    "globs",
    multiple=True,
    required=True,
    help="The store path names that the rule is about; a policy's own globs are of images.",
)
@click.option("--trust-config", help="Of a private Sigstore; the public one needs none.")
def import_(file: Any, globs: tuple[str, ...], trust_config: str | None) -> None:
    """Print the [[policy]] that a ClusterImagePolicy (YAML) stands for, as TOML.

    What cannot be said here is an error: a rule that asks for less is never written.
    """
    from narseal.client.cluster_image_policy import translate

    click.echo(translate(file.read(1 << 20), globs=globs, trust_config=trust_config), nl=False)


async def _statuses(
    config: Config, store_paths: list[StorePath]
) -> list[tuple[StorePath, dict[str, Any] | NarsealError]]:
    """Of each path its status, or why there is none: one says nothing of the others."""
    from narseal.pipeline.substituter import Substituter
    from narseal.storage import Epoch, LocalStorage, join_if_known

    join_if_known(config.storage.index, LocalStorage(config.storage.url))
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        found: list[tuple[StorePath, dict[str, Any] | NarsealError]] = []
        for path in store_paths:
            try:
                found.append((path, await substituter.provenance.status(path)))
            except NarsealError as error:
                found.append((path, error))
        return found


def _store_path(path: str) -> StorePath:
    try:
        return StorePath.parse(path.rpartition("/")[2])
    except MalformedStorePath as error:
        raise click.UsageError(f"{path}: {error}") from error
