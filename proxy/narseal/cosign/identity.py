"""Identity tokens for Fulcio, from wherever the operator has them; asked for anew before they end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import requests
from sigstore.oidc import IdentityError, IdentityToken, detect_credential

from narseal.errors import ConfigError, UpstreamTrouble

_MAX_BYTES = 64 << 10
AUDIENCE = "sigstore"

#: Gives a raw token that is good now. Blocks; raises ConfigError or UpstreamTrouble.
TokenSource = Callable[[], str]


def parse(raw: str, *, source: str) -> IdentityToken:
    """A token that is good now; UpstreamTrouble if it is none, was made for others, or has ended."""
    try:
        return IdentityToken(raw.strip(), AUDIENCE)
    except IdentityError as error:
        why = error.__cause__ or error
        raise UpstreamTrouble(f"the identity token from {source} cannot be used: {why}") from error


def from_file(file: Path) -> TokenSource:
    """Read anew each time: whoever owns the file renews it."""

    def read() -> str:
        try:
            with file.open(encoding="ascii") as opened:
                return opened.read(_MAX_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise UpstreamTrouble(f"{file}: the identity token cannot be read: {error}") from error

    return read


def from_environment(variable: str) -> TokenSource:
    """From a variable of this process."""

    def read() -> str:
        if not (token := os.environ.get(variable)):
            raise ConfigError(f"the identity token's variable {variable} is not set")
        return token

    return read


def ambient() -> str:
    """From the CI system that this runs in (GitHub, GitLab, Buildkite, Google Cloud, …)."""
    try:
        token = detect_credential(AUDIENCE)
    except Exception as error:  # the id library lets requests' errors through
        raise UpstreamTrouble(f"the CI system gives no identity token: {error}") from error
    if not token:
        raise ConfigError(
            "there is no identity token: this is no CI system that offers one; set"
            " cosign.identity_token_file, or cosign.oidc_issuer with a client"
        )
    return token


def from_client_credentials(
    issuer: str, client_id: str, secret: Callable[[], str], *, timeout: float
) -> TokenSource:
    """OAuth 2.0's client-credentials grant at an OIDC issuer (RFC 6749, section 4.4)."""

    def ask() -> str:
        try:
            found = requests.get(f"{issuer}/.well-known/openid-configuration", timeout=timeout)
            found.raise_for_status()
            answer = requests.post(
                str(found.json()["token_endpoint"]),
                data={"grant_type": "client_credentials", "scope": "openid", "audience": AUDIENCE},
                auth=(client_id, secret()),
                timeout=timeout,
            )
            answer.raise_for_status()
            tree = answer.json()
            return str(tree.get("id_token") or tree["access_token"])
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise UpstreamTrouble(f"{issuer} gives no identity token: {error}") from error

    return ask
