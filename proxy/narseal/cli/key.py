"""`narseal key …`: the operator's substituter keys."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from narseal.custody import FileKey, write_private
from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import SecretKey


@click.group()
def key() -> None:
    """Make and show substituter keys, in the files that Nix itself reads and writes."""


@key.command()
@click.argument("name")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="The secret key's file; NAME.secret by default. It must not exist.",
)
def generate(name: str, output: Path | None) -> None:
    """Make a key pair; NAME is a host name and a number, such as cache.example.org-1.

    The secret key goes into a file of mode 0600, the public key to standard output.
    """
    try:
        secret = SecretKey.from_seed(name, os.urandom(32))
    except MalformedKey as error:
        raise ConfigError(str(error)) from error
    file = output or Path(f"{name}.secret")
    write_private(file, secret.render())
    click.echo(f"wrote {file}", err=True)
    click.echo(str(secret.public))


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def public(file: Path) -> None:
    """Print the public key of a secret key file; `-` reads standard input."""
    if str(file) == "-":
        try:
            click.echo(str(SecretKey.parse(sys.stdin.read(4096)).public))
        except MalformedKey as error:
            raise ConfigError(str(error)) from error
    else:
        click.echo(str(FileKey.load(f"file:{file}").public))
