"""Reading the configuration file, for every command that needs it."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import click

from narseal.config import Config
from narseal.errors import ConfigError

_DEFAULT = "/etc/narseal/narseal.toml"

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=_DEFAULT,
    show_default=True,
    envvar="NARSEAL_CONFIG",
    help="The TOML file; every key can also be set as NARSEAL_SECTION__KEY.",
)


def load(file: Path) -> Config:
    """The configuration; ConfigError with file, line and reason."""
    text = read(file)
    environ = {name: value for name, value in os.environ.items() if name != "NARSEAL_CONFIG"}
    return Config.parse(text, environ=environ, source=str(file))


def read(file: Path) -> str:
    """A configuration file's text; ConfigError if it cannot be read."""
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name the file with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error}") from error


def time_of(text: str) -> datetime:
    """The value of `--since`: a time with its zone; UsageError if it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.UsageError(f"--since: {error}") from error
    if found.tzinfo is None:
        raise click.UsageError("--since needs a time zone, for example 2026-11-21T10:00:00Z")
    return found
