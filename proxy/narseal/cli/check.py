"""`narseal check-config`."""

from __future__ import annotations

from pathlib import Path

import click

from narseal.cli.load import config_option, load


@click.command("check-config")
@config_option
def check_config(config_file: Path) -> None:
    """Check the configuration file and the key files that it names, without serving."""
    from narseal.pipeline.trust.sigstore import token_source
    from narseal.server.check import check

    config = load(config_file)
    found = check(config)
    cosigning = found.cosigning
    click.echo(f"{config_file}: good")
    for key in found.keys:
        click.echo(f"  signs with   {key}")
    if cosigning.key:
        click.echo(f"  cosigns with {config.cosign.key} (hint {cosigning.key.public.hint})")
    elif config.cosign.mode == "keyless":
        click.echo(f"  cosigns      keyless, with a token from {token_source(config.cosign)[1]}")
    for upstream in config.upstream:
        names = ", ".join(public.name for public in upstream.public_keys)
        if upstream.verify == "bundle":
            signer = upstream.identity or upstream.identity_regex or upstream.cosign_key
            names = f"{names} and bundles of {signer}" if names else f"bundles of {signer}"
        names = names or "its content"
        click.echo(f"  trusts       {upstream.url} by {names}")
    if (config.upload.oidc or config.upload.tokens_file) and not config.upload.enabled:
        click.echo("  uploads      off: upload.enabled is not true")
    for warning in found.warnings:
        click.echo(f"  warning      {warning}")
    for number, rule in enumerate(config.policy):
        asked = rule.require or rule.action
        click.echo(f"  policy[{number}]    {', '.join(rule.match)}: {asked}")
    if config.policy:
        click.echo(f"  else         {config.policy_default}")
