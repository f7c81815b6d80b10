"""What the commands of Sigstore share: who must have signed, and progress bars."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from narseal.cosign.verify import Verifier

_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Expectation:
    """Who must have signed, as the options say it."""

    key: Path | None
    identity: str | None
    identity_regex: str | None
    issuer: str | None
    trusted_root: Path | None
    offline: bool

    def verifier(self) -> Verifier | None:
        """None if the options name nobody; UsageError if they contradict each other."""
        from narseal.cosign import trust
        from narseal.cosign.verify import ByIdentity, ByKey, Verifier
        from narseal.pipeline.cosigning import read_public_key

        name = self.identity or self.identity_regex
        if self.key and (name or self.issuer):
            raise click.UsageError("either --key, or --identity with --issuer")
        if self.identity and self.identity_regex:
            raise click.UsageError("either --identity or --identity-regex")
        if bool(name) != bool(self.issuer):
            raise click.UsageError("--identity and --issuer belong together")
        if self.identity_regex:
            try:
                re.compile(self.identity_regex)
            except re.error as error:
                raise click.UsageError(
                    f"--identity-regex is no regular expression: {error}"
                ) from error
        known = trust.load(self.trusted_root) if self.trusted_root else None
        if self.key:
            return Verifier(ByKey((read_public_key(self.key),)), known)
        if not name or not self.issuer:
            return None
        if known is None and self.offline:
            raise click.UsageError("--offline needs --trusted-root for a keyless signature")
        expected = ByIdentity(name, self.issuer, is_regex=self.identity is None)
        return Verifier(expected, known or trust.public_instance())


def expectation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an `expectation`: `--key`, or `--certificate-identity` with `--certificate-oidc-issuer`, as cosign has them."""
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

    @functools.wraps(command)
    def with_expectation(**given: Any) -> Any:
        names = [field.name for field in fields(Expectation)]
        expectation = Expectation(**{name: given.pop(name) for name in names})
        return command(expectation=expectation, **given)

    for option in reversed(options):
        with_expectation = option(with_expectation)
    return with_expectation


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
