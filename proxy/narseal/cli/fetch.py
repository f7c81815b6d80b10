"""`narseal fetch`: a download that has its name only once it was verified."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from narseal.cli.sigstore import Expectation, expectation_options, progress
from narseal.errors import ConfigError

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("url")
@click.option("--output", "-o", type=_FILE, help="The URL's last part by default.")
@click.option("--bundle-url", help="URL.sigstore.json by default.")
@expectation_options
@click.option("--max-size", type=click.IntRange(1), default=64 << 30, help="Bytes; 64 GiB.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def fetch(
    url: str,
    output: Path | None,
    bundle_url: str | None,
    expectation: Expectation,
    max_size: int,
    force: bool,
) -> None:
    """Download a release file from URL, verify it with its Sigstore bundle, then name it.

    Say who must have signed it: --key, or --identity with --issuer. What does not verify is gone.
    """
    from narseal.client import download

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise click.UsageError(f"{url}: not an http:// or https:// URL")
    name = unquote(parts.path.rpartition("/")[2])
    if output is None and (not name or "/" in name or name.startswith(".")):
        raise click.UsageError(f"{url} ends in no file name; give one by --output")
    target = output or Path(name)
    if target.exists() and not force:
        raise ConfigError(f"{target} is there already; --force replaces it")
    who = expectation.verifier()
    if who is None:
        raise click.UsageError("say who must have signed: --key, or --identity and --issuer")
    with progress(of_bytes=True, shown=True) as bar:
        task = bar.add_task(target.name, total=None)

        def told(size: int | None, count: int) -> None:
            bar.update(task, total=size, advance=count)

        verified = download.fetch(
            url,
            target,
            bundle_url=bundle_url or f"{url}.sigstore.json",
            verifier=who,
            max_bytes=max_size,
            progress=told,
        )
    click.echo(f"verified {target}: signed by {verified.signer}")
