"""`narseal sign`: Sigstore signatures for release files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from narseal.cli.sigstore import Signing, progress, signing_options
from narseal.errors import ConfigError

_PATH = click.Path(path_type=Path, exists=True)


@click.command()
@click.argument("files", nargs=-1, required=True, type=_PATH)
@signing_options
@click.option("--legacy", is_flag=True, help="Write FILE.sig and FILE.pem too, for older cosign.")
@click.option("--force", is_flag=True, help="Replace signatures that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print what was signed as JSON lines.")
def sign(
    files: tuple[Path, ...],
    signing: Signing,
    legacy: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Sign release FILES (NARs, images, archives): FILE.sigstore.json is what cosign verifies.

    An OCI image layout is signed as its index.json, after every blob was held to its digest.
    """
    from narseal.client import release
    from narseal.pipeline.trust.sigstore import SigstoreSetup

    config = signing.config()
    targets = [release.signable(file) for file in files]
    for target in targets:
        if _beside(target, ".sigstore.json").exists() and not force:
            raise ConfigError(f"{target}.sigstore.json is there already; --force replaces it")
    signer = SigstoreSetup(config).signer()
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
                    "signer": signer.who,
                }
                click.echo(json.dumps(line))
            else:
                bar.console.print(f"signed {target} as {signer.who}", highlight=False)


def _write_legacy(target: Path, data: bytes) -> None:
    from narseal.cosign.bundle import Bundle
    from narseal.pipeline.attest.bundles import certificate_pem, signature_text

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
