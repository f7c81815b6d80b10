"""`narseal serve`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import click

from narseal import __version__
from narseal.cli.load import config_option, load
from narseal.config import Config
from narseal.telemetry.logs import configure


@click.command()
@config_option
def serve(config_file: Path) -> None:
    """Serve the configured upstreams as one verified, countersigned binary cache."""
    config = load(config_file)
    configure(config.log.level)
    # prometheus_client looks at this when it is imported, so before anything that counts
    directory = tempfile.mkdtemp(prefix="narseal-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    try:
        sys.exit(_run(config, config_file))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(config: Config, file: Path) -> int:
    from narseal.runtime.allocation import give_back_large
    from narseal.runtime.sockets import url_of
    from narseal.server.supervisor import Supervisor

    give_back_large()
    supervisor = Supervisor(config, file=file, load=lambda: load(file))
    keys = " ".join(map(str, supervisor.public_keys))
    url = url_of(supervisor.sockets[0][0], tls=config.tls is not None)

    where = (
        url
        if url.startswith("http")
        else "https://… of the web server before it (examples/nginx.conf)"
    )

    def banner() -> None:
        click.echo(
            f"narseal {__version__} serves {url}\n\n"
            "  For nix.conf:\n"
            f"    substituters = {where}\n"
            f"    trusted-public-keys = {keys}\n"
        )

    return supervisor.run(banner)
