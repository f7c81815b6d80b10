"""Options that `sign` and `verify` share, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path, dir_okay=False)


def expectation_options(command: F) -> F:
    """`--key`, or `--certificate-identity` with `--certificate-oidc-issuer`, as cosign has them."""
    options = [
        click.option("--key", type=_FILE, help="The cosign.pub that must have signed."),
        click.option("--identity", "--certificate-identity", help="Exactly who must have signed."),
        click.option("--identity-regex", help="A regular expression for the whole identity."),
        click.option("--issuer", "--certificate-oidc-issuer", help="The identity's exact issuer."),
        click.option(
            "--trusted-root",
            type=_FILE,
            help="A trusted root or trust config; with --key it also asks for a log entry.",
        ),
        click.option(
            "--offline", is_flag=True, help="Use only the bundle and the trusted root file."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def verifier(
    *,
    key: Path | None,
    identity: str | None,
    identity_regex: str | None,
    issuer: str | None,
    trusted_root: Path | None,
    offline: bool,
) -> Any:
    """A Verifier of the options; None if they name nobody; UsageError if they contradict."""
    from narseal.cosign import trust
    from narseal.cosign.verify import ByIdentity, ByKey, Verifier
    from narseal.pipeline.cosigning import read_public_key

    name = identity or identity_regex
    if key and (name or issuer):
        raise click.UsageError("either --key, or --identity with --issuer")
    if identity and identity_regex:
        raise click.UsageError("either --identity or --identity-regex")
    if bool(name) != bool(issuer):
        raise click.UsageError("--identity and --issuer belong together")
    if identity_regex:
        try:
            re.compile(identity_regex)
        except re.error as error:
            raise click.UsageError(f"--identity-regex is no regular expression: {error}") from error
    known = trust.load(trusted_root) if trusted_root else None
    if key:
        return Verifier(ByKey((read_public_key(key),)), known)
    if not name or not issuer:
        return None
    if known is None and offline:
        raise click.UsageError("--offline needs --trusted-root for a keyless signature")
    expected = ByIdentity(name, issuer, is_regex=identity is None)
    return Verifier(expected, known or trust.public_instance())


def progress(*, of_bytes: bool, shown: bool) -> Progress:
    """A bar on standard error, where a person looks at it."""
    console = Console(stderr=True)
    amount = DownloadColumn(binary_units=True) if of_bytes else MofNCompleteColumn()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
