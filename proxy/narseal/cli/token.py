"""`narseal token …`: who may upload."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from narseal.custody import expand, tokens
from narseal.nix.name_globs import check_name_glob

_FILE = click.Path(path_type=Path, dir_okay=False)
_NAME = re.compile(r"[A-Za-z0-9._@:/+-]{1,100}", re.ASCII)
_DAYS = re.compile(r"([0-9]{1,5})d", re.ASCII)

tokens_file = click.option(
    "--tokens-file",
    type=_FILE,
    default="/var/lib/narseal/tokens",
    show_default=True,
    help="What upload.tokens_file names; a running narseal sees changes within a second.",
)


@click.group()
def token() -> None:
    """Make, list and revoke the tokens with which `nix copy --to` uploads."""


@token.command()
@click.argument("name")
@tokens_file
@click.option("--allow", multiple=True, help="A glob on store path names; `*` is everything.")
@click.option("--expires", help="After so many days, as 90d; never by default.")
def add(name: str, tokens_file: Path, allow: tuple[str, ...], expires: str | None) -> None:
    """Make a token called NAME and print it, once."""
    if not _NAME.fullmatch(name):
        raise click.UsageError(
            "NAME is 1 to 100 of: letters, digits and . _ @ : / + -, as a netrc can have it"
        )
    if not allow:
        raise click.UsageError("say what it covers: --allow 'app-*', or --allow '*'")
    for glob in allow:
        try:
            check_name_glob(glob)
        except ValueError as error:
            raise click.UsageError(f"--allow: {error}") from error
    match = _DAYS.fullmatch(expires) if expires is not None else None
    if expires is not None and not (match and int(match[1])):
        raise click.UsageError("--expires is a number of days, at least a day, as 90d")
    until = time.time() + int(match[1]) * 86400 if match else None
    id_, text = tokens.add(Path(expand(str(tokens_file))), name, allow=allow, expires=until)
    click.echo(
        f"made {id_}; in a netrc: machine HOST login {name} password, and then the token:", err=True
    )
    click.echo(text)


@token.command()
@click.argument("id_or_name")
@tokens_file
def revoke(id_or_name: str, tokens_file: Path) -> None:
    """Take a token out, by its id or name."""
    for gone in tokens.revoke(Path(expand(str(tokens_file))), id_or_name):
        click.echo(f"revoked {gone.id} ({gone.name})")


@token.command("list")
@tokens_file
def list_(tokens_file: Path) -> None:
    """Show every token: id, name, end, what it covers."""
    for item in tokens.listed(Path(expand(str(tokens_file)))):
        end = (
            datetime.fromtimestamp(item.expires, UTC).date().isoformat()
            if item.expires
            else "never"
        )
        click.echo(f"{item.id}  {item.name}  ends {end}  {' '.join(item.allow)}")
