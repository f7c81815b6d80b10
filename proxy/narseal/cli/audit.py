"""`narseal audit …`: the signer's log."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from narseal.cli.load import time_of
from narseal.cli.sigstore import Expectation, expectation_options
from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import PublicKey

if TYPE_CHECKING:
    from narseal.cosign.statement import AuditHead

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def audit() -> None:
    """Read and verify the log of everything that `narseal signer` signed."""


@audit.command()
@click.argument("log", type=_FILE)
@click.option("--public-key", help="name:base64 of the audit key; without it, only the chain.")
@click.option("--anchors", type=_FILE, help="Bundles that anchor it, a line each; with who signed.")
@expectation_options
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def verify(
    log: Path,
    public_key: str | None,
    anchors: Path | None,
    expectation: Expectation,
    as_json: bool,
) -> None:
    """Find lines of LOG that were removed, changed, put elsewhere or cut off.

    With --anchors, also what was changed by one who has the audit key: bundles of
    /attestations/sha256:HEAD, which --key or --identity must have signed.
    """
    from narseal.signer import audit as logs

    try:
        key = PublicKey.parse(public_key) if public_key else None
    except MalformedKey as error:
        raise click.UsageError(f"--public-key: {error}") from error
    report = logs.verify(log, key, _anchored(anchors, expectation) if anchors else ())
    if as_json:
        found = {"lines": report.lines, "checkpoints": report.checkpoints, "last": report.last}
        click.echo(json.dumps({**found, "problems": report.problems}))
    else:
        for problem in report.problems:
            click.echo(problem, err=True)
        word = f"{len(report.problems)} problems" if report.problems else "good"
        click.echo(f"{word}: {report.lines} lines, {report.checkpoints} checkpoints")
    sys.exit(1 if report.problems else 0)


@audit.command()
@click.argument("log", type=_FILE)
@click.option("--path", help="Only what is about this store path, or a part of it.")
@click.option("--key", help="Only what this key signed.")
@click.option("--since", help="Only what is not older than this time, as 2026-11-21T10:00:00Z.")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are.")
def show(log: Path, path: str | None, key: str | None, since: str | None, as_json: bool) -> None:
    """Print what LOG says was signed."""
    from narseal.signer import audit as logs

    began = time_of(since) if since else None
    for record in logs.records(log):
        subject, name = str(record.get("subject", "")), str(record.get("key", ""))
        is_old = began is not None and _is_before(record.get("time"), began)
        if (path and path not in subject) or (key and key != name) or is_old:
            continue
        if as_json:
            click.echo(json.dumps(record, separators=(",", ":")))
        else:
            click.echo(
                f"{record.get('n'):>8} {record.get('time')} {record.get('kind')} {subject}"
                f" {name} {record.get('evidence', '')}".rstrip()
            )


def _is_before(time: object, began: datetime) -> bool:
    """Whether a line's time is known to be earlier."""
    try:
        return datetime.fromisoformat(str(time)) < began
    except (ValueError, TypeError):
        return False


def _anchored(file: Path, expectation: Expectation) -> list[AuditHead]:
    """The heads that verified bundles anchor."""
    from narseal.cosign.bundle import Bundle, Envelope
    from narseal.cosign.statement import Statement, audit_heads

    who = expectation.verifier()
    if who is None:
        raise click.UsageError("--anchors: say who must have signed: --key, or --identity")
    found = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    for line in lines:
        bundle = Bundle.parse(line)
        if isinstance(bundle.content, Envelope):
            statement = Statement.parse(bundle.content.payload)
            who.verify(bundle, statement.subjects[0].digest)
            found += audit_heads(statement)
    return found
