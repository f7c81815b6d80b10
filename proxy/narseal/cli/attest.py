"""`narseal attest`: say something about a store path or a file, sign it, leave it at a narseal."""

from __future__ import annotations

import os
from pathlib import Path

import click

from narseal.cli.sigstore import Signing, predicate_type_option, signing_options
from narseal.errors import ConfigError, MalformedAttestation, MalformedHash, MalformedStorePath
from narseal.nix.hashes import Hash
from narseal.nix.store_path import StorePath

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--predicate", required=True, type=_FILE, help="A JSON object: what is said.")
@click.option(
    "--type",
    "predicate_type",
    required=True,
    callback=predicate_type_option,
    help="A URI, or as cosign: slsaprovenance1, spdxjson, cyclonedx, openvex, vuln, …",
)
@click.option("--digest", help="sha256:… of its NAR or file, instead of reading PATH.")
@click.option("--to", "url", help="The narseal to leave it at.")
@click.option("--token-file", type=_FILE, help="An upload token; else the netrc is asked.")
@click.option("--output", "-o", type=_FILE, help="Write the bundle here.")
@click.option("--store-dir", default="/nix/store", show_default=True)
@signing_options
def attest(
    path: Path,
    predicate: Path,
    predicate_type: str,
    digest: str | None,
    url: str | None,
    token_file: Path | None,
    output: Path | None,
    store_dir: str,
    signing: Signing,
) -> None:
    """Attest what PATH is: a store path, by the hash of its NAR, or a file, by its own.

    The bundle is a DSSE envelope with an in-toto statement, which `cosign
    verify-blob-attestation` verifies, too. narseal takes it from those whom its policy names.
    """
    from narseal.client import api
    from narseal.cosign.statement import MAX_BYTES, Subject, read_json, render_statement
    from narseal.pipeline.trust.sigstore import SigstoreSetup

    if not url and not output:
        raise click.UsageError("say where it goes: --to URL, or --output FILE")
    try:
        said = read_json(_read(predicate), limit=MAX_BYTES // 2, what=str(predicate))
    except MalformedAttestation as error:
        raise ConfigError(str(error)) from error
    if not isinstance(said, dict):
        raise ConfigError(f"{predicate}: a predicate is a JSON object")
    subject = Subject(*_subject(path, digest, store_dir))
    statement = render_statement([subject], predicate_type, said)
    bundle = SigstoreSetup(signing.config()).signer().sign_statement(statement)
    if output:
        try:
            output.write_bytes(bundle)
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
        click.echo(f"wrote {output}")
    if url:
        new = api.leave(url, subject.digest, bundle, token_file=token_file)
        click.echo(
            f"{'left' if new else 'is there already:'} {predicate_type} of {subject.name}"
            f" (sha256:{subject.digest.hex()}) at {url}"
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _subject(path: Path, digest: str | None, store_dir: str) -> tuple[str, bytes]:
    """Its name in the statement, and its digest."""
    from narseal.client import dump, release

    known = None
    if digest is not None:
        try:
            known = Hash.parse(digest)
        except MalformedHash as error:
            raise click.UsageError(f"--digest: {error}") from error
        if known.algorithm != "sha256":
            raise click.UsageError("--digest is sha256:…")
    absolute = Path(os.path.abspath(path))
    if absolute.parent == Path(store_dir):
        try:
            name = f"{store_dir}/{StorePath.parse(absolute.name)}"
        except MalformedStorePath as error:
            raise click.UsageError(str(error)) from error
        return name, (known or dump.nar_hash(absolute)).digest
    if known:
        return path.name, known.digest
    if path.is_dir():
        raise click.UsageError(f"{path} is a folder, and not below {store_dir}")
    return path.name, release.digest(path)
