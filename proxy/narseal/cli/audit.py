"""`narseal audit …`: the signer's log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from narseal.errors import MalformedKey
from narseal.nix.keys import PublicKey

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def audit() -> None:
    """Read and verify the log of everything that `narseal signer` signed."""


@audit.command()
@click.argument("log", type=_FILE)
@click.option("--public-key", help="name:base64 of the audit key; without it, only the chain.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def verify(log: Path, public_key: str | None, as_json: bool) -> None:
    """Find lines of LOG that were removed, changed, put elsewhere or cut off."""
    from narseal.custody import audit as logs

    try:
        key = PublicKey.parse(public_key) if public_key else None
    except MalformedKey as error:
        raise click.UsageError(f"--public-key: {error}") from error
    report = logs.verify(log, key)
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
    from narseal.custody import audit as logs

    for record in logs.records(log):
        subject, name = str(record.get("subject", "")), str(record.get("key", ""))
        late = since is None or str(record.get("time", "")) >= since
        if (path and path not in subject) or (key and key != name) or not late:
            continue
        if as_json:
            click.echo(json.dumps(record, separators=(",", ":")))
        else:
            click.echo(
                f"{record.get('n'):>8} {record.get('time')} {record.get('kind')} {subject}"
                f" {name} {record.get('evidence', '')}".rstrip()
            )
