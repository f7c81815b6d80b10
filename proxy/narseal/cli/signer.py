"""`narseal signer`: the keys in a process of their own."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default="/etc/narseal/signer.toml",
    show_default=True,
    help="What it signs with, for whom, on what evidence, and where it writes that down.",
)
@click.option("--check", is_flag=True, help="Check the file and the keys, and end.")
def signer(config_file: Path, check: bool) -> None:
    """Hold the operator's keys, and sign for the narseal that faces the network.

    It verifies the evidence itself and writes each signature down before it leaves.
    """
    from narseal.cli.load import read
    from narseal.config.signer import SignerConfig
    from narseal.signer.rules import SigningRules
    from narseal.signer.server import allowed, run
    from narseal.telemetry.logs import configure

    config = SignerConfig.parse(read(config_file), source=str(config_file))
    configure("info")
    if check:
        allowed(config)
        rules = SigningRules(config)
        for key in rules.public_keys():
            click.echo(f"{key['type']:<8} {key['name']}")
        rules.close()
        return
    run(config)
