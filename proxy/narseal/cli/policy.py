"""`narseal policy …`: try the rules, and take them over from a ClusterImagePolicy."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from narseal.cli.load import config_option, load
from narseal.config import Config
from narseal.errors import MalformedStorePath
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
    Exit code 1 if one is kept back.
    """
    found = asyncio.run(_statuses(load(config_file), [_store_path(path) for path in paths]))
    for tree in found:
        verdict = tree["policy"]
        if as_json:
            click.echo(json.dumps({"storePath": tree["storePath"], **verdict}))
        else:
            word = "served" if verdict["allowed"] else "kept back"
            click.echo(f"{tree['storePath']}: {word}: {verdict['rule']}: {verdict['why']}")
    sys.exit(0 if all(tree["policy"]["allowed"] for tree in found) else 1)


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


async def _statuses(config: Config, store_paths: list[StorePath]) -> list[dict[str, Any]]:
    from narseal.pipeline.substituter import Substituter
    from narseal.storage import Epoch, LocalStorage, join_if_known

    join_if_known(config.storage.index, LocalStorage(config.storage.url))
    epoch = Epoch.of(config.storage.index)
    async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
        return [await substituter.provenance.status(path) for path in store_paths]


def _store_path(path: str) -> StorePath:
    try:
        return StorePath.parse(path.rpartition("/")[2])
    except MalformedStorePath as error:
        raise click.UsageError(f"{path}: {error}") from error
