"""`narseal key …`: the operator's substituter keys."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from narseal.custody import FileKey, expand, read_private, write_private
from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import SecretKey


@click.group()
def key() -> None:
    """Make and show keys, in the files that Nix and cosign themselves read and write."""


@key.command()
@click.argument("name", required=False)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="The secret key's file; NAME.secret, or cosign.key, by default. It must not exist.",
)
@click.option("--cosign", is_flag=True, help="A cosign key pair: cosign.key and cosign.pub.")
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    help="With --cosign: the file with the password; a terminal is asked else.",
)
def generate(
    name: str | None, output: Path | None, cosign: bool, password_file: Path | None
) -> None:
    """Make a key pair; NAME is a host name and a number, such as cache.example.org-1.

    The secret key goes into a file of mode 0600, the public key to standard output.
    """
    if cosign:
        _generate_cosign(output or Path("cosign.key"), password_file)
        return
    if name is None:
        raise click.UsageError("a substituter key needs a NAME; --cosign makes a cosign key")
    try:
        secret = SecretKey.from_seed(name, os.urandom(32))
    except MalformedKey as error:
        raise ConfigError(str(error)) from error
    file = output or Path(f"{name}.secret")
    write_private(file, secret.render())
    click.echo(f"wrote {file}", err=True)
    click.echo(str(secret.public))


def _generate_cosign(file: Path, password_file: Path | None) -> None:
    from narseal.cosign.keys import CosignKey

    if file.suffix == ".pub":
        raise click.UsageError("--output names the private key's file; the public one is beside it")
    made = CosignKey.generate()
    public_file = file.with_suffix(".pub")
    if public_file.exists():
        raise ConfigError(f"{public_file} is there already")
    write_private(file, made.render(_password(password_file)))
    public_file.write_text(made.public.render())
    click.echo(f"wrote {file} and {public_file}", err=True)
    click.echo(made.public.render(), nl=False)


def _password(file: Path | None) -> bytes:
    """Never from the command line, where every process of the machine could read it."""
    if file is not None:
        return read_private(Path(expand(str(file)))).rstrip("\r\n").encode()
    if not sys.stdin.isatty():
        raise ConfigError("no terminal to ask for a password; give --password-file")
    text: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, default="")
    return text.encode()


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
def public(file: Path) -> None:
    """Print the public key of a substituter's secret key file; `-` reads standard input."""
    if str(file) == "-":
        try:
            click.echo(str(SecretKey.parse(sys.stdin.read(4096)).public))
        except MalformedKey as error:
            raise ConfigError(str(error)) from error
    else:
        click.echo(str(FileKey.load(f"file:{file}").public))
