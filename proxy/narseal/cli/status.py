"""`narseal status`: what a running narseal knows."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("path")
@click.option("--from", "url", default="http://127.0.0.1:8080", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(path: str, url: str, as_json: bool) -> None:
    """Show what the narseal at URL knows of a store PATH: evidence, policy, attestations."""
    from narseal.pipeline import delivery

    tree = delivery.status(url, path.rpartition("/")[2])
    if as_json:
        click.echo(json.dumps(tree))
        return
    _show(tree)


def _show(tree: dict[str, Any]) -> None:
    policy = tree["policy"]
    word = "served" if policy["allowed"] else "kept back"
    rows = [
        ("NAR", f"{tree['narHash']}, {tree['narSize']} bytes"),
        ("evidence", tree["evidence"] + ("" if tree["admitted"] else " (not admitted yet)")),
        ("signed by", ", ".join(tree["signatures"]) or "nobody"),
        ("in storage", "yes" if tree["stored"] else "no"),
        ("policy", f"{word}: {policy['rule']}: {policy['why']}"),
    ]
    for item in tree["attestations"]:
        said = f"{item['predicateType']} by {item['signer']}, since {item['since']}"
        rows.append(("attested", said))
    click.echo(tree["storePath"])
    for name, value in rows:
        click.echo(f"  {name:<11} {value}")
