"""`narseal status`: what a running narseal knows."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("path", required=False)
@click.option("--from", "url", default="http://127.0.0.1:8080", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(path: str | None, url: str, as_json: bool) -> None:
    """Show what the narseal at URL knows of a store PATH: evidence, policy, attestations.

    Without PATH: its keys, how many paths lack a signature, what waits, what is revoked; for
    callers of its own machine.
    """
    from narseal.client import api

    tree = api.status(url, path.rpartition("/")[2] if path else None)
    if as_json:
        click.echo(json.dumps(tree))
    elif path:
        _show_path(tree)
    else:
        _show(tree)


def _show(tree: dict[str, Any]) -> None:
    cosign = tree["cosign"]
    click.echo(f"narseal {tree['version']}: {tree['paths']} paths, {tree['storedBytes']} bytes")
    for key in tree["keys"]:
        times = [f"{word} {key[name]}" for word, name in (("from", "notBefore"), ("until", "notAfter"))
                 if key[name]]  # fmt: skip
        state = "signs" if key["active"] else "signs no more, or not yet"
        click.echo(f"  key         {key['name']}: {', '.join([state, *times])}")
    click.echo(f"  unsigned    {tree['lackSignatures']} paths lack the signature of an active key")
    click.echo(f"  cosign      {cosign['mode']}: {cosign['waiting']} paths wait")
    for item in tree["revoked"]:
        click.echo(f"  revoked     {item['name']}: {item['reason']}")


def _show_path(tree: dict[str, Any]) -> None:
    policy = tree["policy"]
    word = "served" if policy["allowed"] else "kept back"
    rows = [("policy", f"{word}: {policy['rule']}: {policy['why']}")]
    if policy["allowed"]:  # else no more is said
        rows = [
            ("NAR", f"{tree['narHash']}, {tree['narSize']} bytes"),
            ("evidence", tree["evidence"] + ("" if tree["admitted"] else " (not admitted yet)")),
            ("signed by", ", ".join(tree["signatures"]) or "nobody"),
            ("in storage", "yes" if tree["stored"] else "no"),
            *rows,
        ]
    for item in tree.get("attestations", []):
        said = f"{item['predicateType']} by {item['signer']}, since {item['since']}"
        rows.append(("attested", said))
    click.echo(tree["storePath"])
    for name, value in rows:
        click.echo(f"  {name:<11} {value}")
