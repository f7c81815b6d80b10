"""`narseal revoke`: take trust back, at once and for good."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from narseal.cli.load import config_option, load, time_of
from narseal.cli.sigstore import progress
from narseal.errors import ConfigError

if TYPE_CHECKING:
    from narseal.config import Config
    from narseal.cosign.keys import CosignPublicKey
    from narseal.pipeline.upkeep.revocation import Outcome
    from narseal.storage import Revocation

_FILE = click.Path(path_type=Path, dir_okay=False)
_SHOWN = 20


@click.command()
@click.argument("key", required=False)
@click.option("--cosign-key", type=_FILE, help="Instead of KEY: a cosign.pub.")
@click.option("--identity", help="Instead of KEY: who signed keyless, with --issuer and --since.")
@click.option("--issuer", help="The identity's exact issuer.")
@click.option("--since", help="From when on its signatures are void, as 2026-11-21T10:00:00Z.")
@click.option("--unknown", is_flag=True, help="Also a KEY that nothing here was signed by.")
@click.option("--reason", required=True, help="One line; it is kept, and shown at /keys.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def revoke(
    key: str | None,
    cosign_key: Path | None,
    identity: str | None,
    issuer: str | None,
    since: str | None,
    unknown: bool,
    reason: str,
    config_file: Path,
    as_json: bool,
) -> None:
    """Revoke a substituter KEY by its name, ours or an upstream's; a cosign key; an identity.

    Every worker stops using it at once. Its signatures are taken off everything; what was admitted on
    other evidence and still verifies is signed with the keys that are active, the rest is withdrawn, and
    admitted anew when it is asked for and an upstream has it on other evidence. A KEY that is neither configured nor has signed anything here is taken
    for a typing error. Run it on narseal's machine, as its user. Exit code 1 if something
    could not be signed anew.
    """
    from narseal.pipeline.trust.sigstore import read_public_key

    public = read_public_key(str(cosign_key)) if cosign_key else None
    revocation = _revocation(key, public, identity, issuer, since, reason)
    outcome = asyncio.run(
        _revoke(load(config_file), revocation, public, unknown=unknown, shown=not as_json)
    )
    if as_json:
        tree = {
            "revoked": revocation.name,
            "stripped": outcome.stripped,
            "signed": outcome.signed,
            "bundles": outcome.bundles,
            "withdrawn": [{"path": path, "why": why} for path, why in outcome.withdrawn],
        }
        click.echo(json.dumps(tree))
    else:
        for path, why in outcome.withdrawn[:_SHOWN]:
            click.echo(f"not signed anew: {path}: {why}", err=True)
        if len(outcome.withdrawn) > _SHOWN:
            click.echo(f"… and {len(outcome.withdrawn) - _SHOWN} more; --json has them", err=True)
        click.echo(
            f"revoked {revocation.name}: taken off {outcome.stripped} paths, {outcome.signed} of"
            f" them signed anew, {len(outcome.withdrawn)} not; {outcome.bundles} bundles dropped"
        )
    sys.exit(1 if outcome.withdrawn else 0)


def _revocation(
    key: str | None,
    cosign_key: CosignPublicKey | None,
    identity: str | None,
    issuer: str | None,
    since: str | None,
    reason: str,
) -> Revocation:
    from narseal.storage import Revocation

    if sum(value is not None for value in (key, cosign_key, identity)) != 1:
        raise click.UsageError("one of KEY, --cosign-key and --identity")
    if not reason.strip() or not reason.isprintable() or len(reason) > 400:
        raise click.UsageError("--reason is one line of up to 400 characters")
    if identity is not None:
        if not issuer or not since:
            raise click.UsageError("--identity needs --issuer and --since")
        return Revocation("identity", identity, issuer, _past(since), reason)
    if issuer or since:
        raise click.UsageError("--issuer and --since belong to --identity")
    if cosign_key is not None:
        return Revocation("cosign", cosign_key.hint, "", 0.0, reason)
    assert key is not None  # one of three
    if ":" in key or not key.isascii() or not key.isprintable() or " " in key:
        raise click.UsageError(f"{key[:80]}: name the key, without the part behind the colon")
    return Revocation("key", key, "", 0.0, reason)


async def _revoke(
    config: Config,
    revocation: Revocation,
    cosign_key: CosignPublicKey | None,
    *,
    unknown: bool,
    shown: bool,
) -> Outcome:
    from narseal.pipeline.substituter import Substituter
    from narseal.storage import Epoch, LocalStorage, join_if_known

    join_if_known(config.storage.index, LocalStorage(config.storage.url))
    epoch = Epoch.of(config.storage.index)
    with progress(of_bytes=False, shown=shown) as bar:
        task = bar.add_task("looking at", total=None)

        def told(what: str, count: int) -> None:
            bar.update(task, description=f"looking at {what}", completed=count)

        async with Substituter.opened(config, epoch=epoch, serving=False) as substituter:
            if revocation.kind == "key" and not unknown:
                await substituter.revoking.check_known(revocation.name)
            return await substituter.revoking.revoke(revocation, told, cosign_key=cosign_key)


def _past(text: str) -> float:
    found = time_of(text)
    if found > datetime.now(UTC):
        raise ConfigError(f"--since {text} is in the future")
    return found.timestamp()
