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

from narseal.cli.load import load

if TYPE_CHECKING:
    from narseal.config import CosignConfig
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
        from narseal.pipeline.trust.sigstore import read_public_key

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
            return Verifier(ByKey((read_public_key(str(self.key)),)), known)
        if not name or not self.issuer:
            return None
        if known is None and self.offline:
            raise click.UsageError("--offline needs --trusted-root for a keyless signature")
        expected = ByIdentity(name, self.issuer, is_regex=self.identity is None)
        return Verifier(expected, known or trust.public_instance())


@dataclass(frozen=True, slots=True)
class Signing:
    """What to sign with, as the options say it."""

    config_file: Path | None
    key: Path | None
    password_file: Path | None
    log: bool
    keyless: bool
    trust_config: Path | None
    identity_token_file: Path | None
    identity_token_env: str | None
    identity: str | None

    def config(self) -> CosignConfig:
        """The options as a section; UsageError if they name no way to sign, or two."""
        from narseal.config import CosignConfig

        if sum((self.config_file is not None, self.key is not None, self.keyless)) != 1:
            raise click.UsageError("one of --key, --keyless and --config")
        if self.identity and not self.keyless:
            raise click.UsageError("--identity is whom the certificate of --keyless must name")
        if self.config_file:
            return load(self.config_file).cosign
        token = self.identity_token_file
        return CosignConfig(
            mode="key" if self.key else "keyless",
            key=f"file:{self.key}" if self.key else None,
            password_file=str(self.password_file) if self.password_file else None,
            log=self.log,
            trust_config=str(self.trust_config) if self.trust_config else None,
            identity_token_file=str(token) if token else None,
            identity_token_env=self.identity_token_env,
            identity=self.identity,
        )


def signing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a `signing`."""
    options = [
        click.option(
            "--config", "config_file", type=_FILE, help="Sign as its [cosign] section says."
        ),
        click.option("--key", type=_FILE, help="An encrypted cosign.key."),
        click.option(
            "--password-file",
            type=_FILE,
            help="The key's password; a $CREDENTIALS_DIRECTORY/… too.",
        ),
        click.option(
            "--log/--no-log", default=False, help="With --key: enter into a log, timestamped."
        ),
        click.option("--keyless", is_flag=True, help="With a certificate for an OIDC identity."),
        click.option("--trust-config", type=_FILE, help="A private Sigstore; else the public one."),
        click.option("--identity-token-file", type=_FILE, help="Else the CI system is asked."),
        click.option("--identity-token-env", help="A variable that holds the token."),
        click.option(
            "--identity", help="Whom the certificate must name; else whoever the token is for."
        ),
    ]
    return _grouped(command, Signing, "signing", options)


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

    return _grouped(command, Expectation, "expectation", options)


def predicate_type_option(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """The URI of a `--type`, which may be one of cosign's short names."""
    from narseal.config import predicate_type

    try:
        return None if text is None else predicate_type(text)
    except ValueError as error:
        raise click.UsageError(f"--type: {error}") from error


def _grouped(
    command: Callable[..., Any], value: type[Any], name: str, options: list[Callable[..., Any]]
) -> Callable[..., Any]:
    """The command with options that come to it as one value."""

    @functools.wraps(command)
    def grouped(**given: Any) -> Any:
        parts = {field.name: given.pop(field.name) for field in fields(value)}
        return command(**{name: value(**parts)}, **given)

    for option in reversed(options):
        grouped = option(grouped)
    return grouped


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
