"""The `narseal` command: one file for each group of commands."""

from __future__ import annotations

import sys

import click

from narseal import __version__
from narseal.cli.attest import attest
from narseal.cli.audit import audit
from narseal.cli.check import check_config
from narseal.cli.fetch import fetch
from narseal.cli.index import index
from narseal.cli.key import key
from narseal.cli.policy import policy
from narseal.cli.revoke import revoke
from narseal.cli.serve import serve
from narseal.cli.sign import sign
from narseal.cli.signer import signer
from narseal.cli.status import status
from narseal.cli.token import token
from narseal.cli.verify import verify
from narseal.errors import NarsealError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="narseal")
def narseal() -> None:
    """A proxy in front of Nix binary caches that verifies what it serves and countersigns it.

    Exit codes: 0 good, 1 a verification or operation failed, 2 usage or configuration,
    3 the outside world failed.
    """


narseal.add_command(serve)
narseal.add_command(check_config)
narseal.add_command(key)
narseal.add_command(sign)
narseal.add_command(verify)
narseal.add_command(fetch)
narseal.add_command(attest)
narseal.add_command(policy)
narseal.add_command(status)
narseal.add_command(token)
narseal.add_command(signer)
narseal.add_command(audit)
narseal.add_command(revoke)
narseal.add_command(index)


def main() -> None:
    """Entry point: errors of ours are one sentence and an exit code, never a traceback."""
    try:
        narseal()
    except NarsealError as error:
        click.echo(f"narseal: {error}", err=True)
        sys.exit(error.exit_code)
