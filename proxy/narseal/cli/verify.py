"""`narseal verify`: files with their bundles, store paths with everything that speaks for them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from narseal.cli.sigstore import (
    Expectation,
    expectation_options,
    predicate_type_option,
    progress,
)
from narseal.errors import ConfigError, MalformedKey, MalformedStorePath, NarsealError
from narseal.nix.keys import PublicKey
from narseal.nix.store_path import StorePath

if TYPE_CHECKING:
    from narseal.client.verification import Outcome
    from narseal.cosign.verify import Verifier

_FILE = click.Path(path_type=Path, dir_okay=False)
_SHOWN = 20


@click.command()
@click.argument("targets", nargs=-1)
@click.option("--bundle", "bundle_file", type=_FILE, help="FILE.sigstore.json by default.")
@expectation_options
@click.option(
    "--type",
    "predicate_type",
    callback=predicate_type_option,
    help="The type that a statement must have: a URI, or as cosign: slsaprovenance1, spdxjson, …",
)
@click.option("--from", "url", help="The substituter whose store paths are verified.")
@click.option("--public-key", "public_keys", multiple=True, help="name:base64 of its Nix key.")
@click.option("--all", "everything", is_flag=True, help="Every path that the substituter lists.")
@click.option("--parallel", type=click.IntRange(1, 64), default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def verify(
    targets: tuple[str, ...],
    bundle_file: Path | None,
    expectation: Expectation,
    predicate_type: str | None,
    url: str | None,
    public_keys: tuple[str, ...],
    everything: bool,
    parallel: int,
    as_json: bool,
) -> None:
    """Verify FILES with Sigstore bundles, or STORE PATHS of a substituter (--from URL).

    Of a store path: its narinfo's signature (--public-key), its NAR against NarHash, FileHash
    and NarSize, and an attestation (--key or --identity) that says what the narinfo says.
    """
    if bool(targets) == everything:
        raise click.UsageError("name files or store paths, or --all with --from")
    who = expectation.verifier()
    if url is None:
        if everything:
            raise click.UsageError("--all needs --from URL")
        if who is None:
            raise click.UsageError("say who must have signed: --key, or --identity and --issuer")
        if bundle_file and len(targets) > 1:
            raise click.UsageError("--bundle is for one file")
        sys.exit(_files(targets, bundle_file, who, predicate_type, as_json=as_json))
    if predicate_type:
        raise click.UsageError("--type is for files; a store path is held to narseal's own type")
    if expectation.offline and not url.startswith("file://"):
        raise click.UsageError("--offline verifies files, or a substituter in a folder (file://)")
    keys = [_public_key(text) for text in public_keys]
    if not keys and who is None:
        raise click.UsageError("say whom to trust: --public-key, and --key or --identity")
    hash_parts = None if everything else [_hash_part(target) for target in targets]
    sys.exit(asyncio.run(_paths(url, hash_parts, keys, who, parallel, as_json=as_json)))


def _files(
    targets: tuple[str, ...],
    bundle_file: Path | None,
    who: Verifier,
    predicate_type: str | None,
    *,
    as_json: bool,
) -> int:
    worst = 0
    total = sum(Path(target).stat().st_size for target in targets if Path(target).is_file())
    with progress(of_bytes=True, shown=not as_json) as bar:
        task = bar.add_task("verifying", total=total)
        for target in targets:
            line: dict[str, Any] = {"file": target, "verified": True}
            try:
                line |= _file(
                    Path(target), bundle_file, who, predicate_type,
                    lambda count: bar.advance(task, count),
                )  # fmt: skip
            except NarsealError as error:
                worst = max(worst, error.exit_code)
                line |= {"verified": False, "reason": error.reason, "error": str(error)}
            if as_json:
                click.echo(json.dumps(line))
            elif line["verified"]:
                click.echo(f"verified {target}: signed by {line['signer']}")
            else:
                click.echo(f"NOT verified {target}: {line['error']}", err=True)
    return worst


def _file(
    target: Path,
    bundle_file: Path | None,
    who: Verifier,
    predicate_type: str | None,
    advance: Any,
) -> dict[str, Any]:
    from narseal.client import release
    from narseal.cosign.bundle import MAX_BYTES, Bundle
    from narseal.errors import Refused

    file = release.signable(target)
    place = bundle_file or file.with_name(file.name + ".sigstore.json")
    try:
        with place.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{place}: cannot be read: {error.strerror}; name it by --bundle"
        ) from error
    bundle = Bundle.parse(data)
    if target.is_dir():
        release.check_layout(target)
    verified = who.verify(bundle, release.digest(file, advance))
    kind = verified.statement.predicate_type if verified.statement else None
    if predicate_type not in (None, kind):
        raise Refused("bad-bundle", f"the bundle is of type {kind}, not {predicate_type}")
    return {"signer": verified.signer, "type": kind, "logIndex": verified.log_index}


async def _paths(
    url: str,
    hash_parts: list[str] | None,
    keys: list[PublicKey],
    who: Verifier | None,
    parallel: int,
    *,
    as_json: bool,
) -> int:
    from narseal.client.verification import Verification, exit_code

    outcomes: list[Outcome] = []
    start = time.monotonic()
    async with Verification.opened(
        url, public_keys=keys, verifier=who, parallel=parallel
    ) as verification:
        if hash_parts is None:
            hash_parts = await verification.listed()
        with progress(of_bytes=False, shown=not as_json) as bar:
            task = bar.add_task("verifying", total=len(hash_parts))

            def done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                bar.advance(task)

            await verification.each(hash_parts, parallel=parallel, done=done)
    _report(outcomes, time.monotonic() - start, keys=keys, who=who, as_json=as_json)
    return exit_code(outcomes)


def _report(
    outcomes: list[Outcome],
    seconds: float,
    *,
    keys: list[PublicKey],
    who: Verifier | None,
    as_json: bool,
) -> None:
    failures = [(outcome, outcome.error) for outcome in outcomes if outcome.error]
    size = sum(outcome.bytes for outcome in outcomes)
    good = len(outcomes) - len(failures)
    checked = ["content"] + ["signature"] * bool(keys) + ["attestation"] * (who is not None)
    if as_json:
        tree = {
            "paths": len(outcomes),
            "verified": good,
            "checked": checked,
            "bytes": size,
            "seconds": round(seconds, 3),
            "failures": [
                {"path": outcome.path, "reason": error.reason, "error": str(error)}
                for outcome, error in failures
            ],
        }
        click.echo(json.dumps(tree))
        return
    for outcome, error in failures[:_SHOWN]:
        click.echo(f"NOT verified {outcome.path}: {error}", err=True)
    if len(failures) > _SHOWN:
        click.echo(f"… and {len(failures) - _SHOWN} more; --json has them all", err=True)
    click.echo(
        f"{good} of {len(outcomes)} paths verified ({', '.join(checked)}),"
        f" {size / 1e6:.1f} MB in {seconds:.1f} s"
    )


def _public_key(text: str) -> PublicKey:
    try:
        return PublicKey.parse(text)
    except MalformedKey as error:
        raise click.UsageError(f"--public-key: {error}") from error


def _hash_part(target: str) -> str:
    try:
        return StorePath.parse(target.rpartition("/")[2]).hash_part
    except MalformedStorePath as error:
        raise click.UsageError(f"{target}: with --from, name store paths: {error}") from error
