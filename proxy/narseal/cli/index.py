"""`narseal index …`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

from narseal.cli.load import config_option, load
from narseal.config import Config


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


async def _check(config: Config, *, content: bool) -> list[str]:
    from narseal.pipeline.checking import problems
    from narseal.pipeline.substituter import load_keys
    from narseal.storage import Index, LocalStorage, migrate

    migrate(config.storage.index)
    opened = Index(config.storage.index, config.store_dir)
    keys = {key.public.name: key.public for key in load_keys(config)}
    async with asyncio.TaskGroup() as group:
        group.create_task(opened.run())
        try:
            storage = LocalStorage(config.storage.url)
            return [sentence async for sentence in problems(opened, storage, keys, content=content)]
        finally:
            await opened.close()
