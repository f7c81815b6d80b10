"""`narseal sign`: Sigstore signatures for release files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from narseal.cli.load import load
from narseal.cli.sigstore import progress
from narseal.config import CosignConfig
from narseal.errors import ConfigError

_PATH = click.Path(path_type=Path, exists=True)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("files", nargs=-1, required=True, type=_PATH)
@click.option("--config", "config_file", type=_FILE, help="Sign as its [cosign] section says.")
@click.option("--key", type=_FILE, help="An encrypted cosign.key.")
@click.option(
    "--password-file", type=_FILE, help="The key's password; a $CREDENTIALS_DIRECTORY/… too."
)
@click.option("--log/--no-log", default=False, help="With --key: enter into a log, timestamped.")
@click.option("--keyless", is_flag=True, help="With a certificate for an OIDC identity.")
@click.option("--trust-config", type=_FILE, help="A private Sigstore; else the public one.")
@click.option("--identity-token-file", type=_FILE, help="Else the CI system is asked.")
@click.option("--identity-token-env", help="A variable that holds the token.")
@click.option("--legacy", is_flag=True, help="Write FILE.sig and FILE.pem too, for older cosign.")
@click.option("--force", is_flag=True, help="Replace signatures that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was signed as JSON lines.")
def sign(
    files: tuple[Path, ...],
    config_file: Path | None,
    key: Path | None,
    password_file: Path | None,
    log: bool,
    keyless: bool,
    trust_config: Path | None,
    identity_token_file: Path | None,
    identity_token_env: str | None,
    legacy: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Sign release FILES (NARs, images, archives): FILE.sigstore.json is what cosign verifies.

    An OCI image layout is signed as its index.json, after every blob was held to its digest.
    """
    from narseal.pipeline import release
    from narseal.pipeline.cosigning import Cosigning

    if sum((config_file is not None, key is not None, keyless)) != 1:
        raise click.UsageError("one of --key, --keyless and --config")
    if config_file:
        config = load(config_file).cosign
    else:
        config = CosignConfig(
            mode="key" if key else "keyless",
            key=f"file:{key}" if key else None,
            password_file=str(password_file) if password_file else None,
            log=log,
            trust_config=str(trust_config) if trust_config else None,
            identity_token_file=str(identity_token_file) if identity_token_file else None,
            identity_token_env=identity_token_env,
        )
    targets = [release.signable(file) for file in files]
    for target in targets:
        if _beside(target, ".sigstore.json").exists() and not force:
            raise ConfigError(f"{target}.sigstore.json is there already; --force replaces it")
    signer = Cosigning(config).signer()
    total = sum(target.stat().st_size for target in targets)
    with progress(of_bytes=True, shown=not as_json) as bar:
        task = bar.add_task("signing", total=total)
        for file, target in zip(files, targets, strict=True):
            bar.update(task, description=file.name)
            if file.is_dir():
                release.check_layout(file)
            digest = release.digest(target, lambda count: bar.advance(task, count))
            bundle = signer.sign_digest(digest)
            _write(_beside(target, ".sigstore.json"), bundle)
            if legacy:
                _write_legacy(target, bundle)
            if as_json:
                line = {
                    "file": str(target),
                    "sha256": digest.hex(),
                    "bundle": f"{target}.sigstore.json",
                }
                click.echo(json.dumps(line))
            else:
                bar.console.print(f"signed {target}", highlight=False)


def _write_legacy(target: Path, data: bytes) -> None:
    from narseal.cosign.bundle import Bundle
    from narseal.pipeline.signatures import certificate_pem, signature_text

    bundle = Bundle.parse(data)
    _write(_beside(target, ".sig"), signature_text(bundle))
    if bundle.certificate is not None:
        _write(_beside(target, ".pem"), certificate_pem(bundle.certificate))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _write(file: Path, data: bytes) -> None:
    """All of it or nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error
