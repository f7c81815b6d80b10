"""Whom to trust: a Sigstore instance's roots, and which services to sign with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sigstore._internal.trust import KeyringPurpose
from sigstore.models import ClientTrustConfig, SigningConfig, TrustedRoot

from narseal.cosign.library import LibraryVerifier, Root
from narseal.errors import ConfigError, UpstreamTrouble

_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Trust:
    """A Sigstore instance, as its clients know it."""

    root: Root
    #: None where only a trusted root is known: enough to verify, not to sign with a log.
    services: SigningConfig | None
    #: The trusted root as clients of cosign take it.
    root_json: bytes


def load(file: Path) -> Trust:
    """A trust-config file, or a trusted root alone; ConfigError if it is neither."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError("too large")
        tree = json.loads(data)
        kind = str(tree["mediaType"])
        if "trustedroot" in kind:
            return Trust(_whole(TrustedRoot.from_file(str(file))), None, data)
        if "clienttrustconfig" in kind:
            config = ClientTrustConfig.from_json(data.decode())
            root = json.dumps(tree["trustedRoot"]).encode()
            return Trust(_whole(config.trusted_root), config.signing_config, root)
        raise ValueError(f"its mediaType is {kind[:80]}")
    except Exception as error:
        # of certificates and keys that are none, libraries say so with errors of every kind
        raise ConfigError(
            f"{file}: neither a client trust config nor a trusted root of Sigstore: {error}"
        ) from error


def _whole(original: TrustedRoot) -> Root:
    """The root, after each certificate and key was read, which sigstore-python else does in use."""
    root = Root(original._inner)  # noqa: SLF001
    LibraryVerifier(trusted_root=root)
    root.get_timestamp_authorities()
    root.rekor_keyring(KeyringPurpose.VERIFY)
    if root._inner.ctlogs:  # noqa: SLF001
        root.ct_keyring(KeyringPurpose.VERIFY)
    return root


def public_instance(*, offline: bool = False) -> Trust:
    """The public-good instance by TUF; UpstreamTrouble if it cannot be reached. Blocks."""
    try:
        config = ClientTrustConfig.production(offline=offline)
        root = config._inner.trusted_root.to_json().encode()  # noqa: SLF001
        return Trust(_whole(config.trusted_root), config.signing_config, root)
    except Exception as error:  # tuf, requests and the file system each have their own
        raise UpstreamTrouble(
            "the public Sigstore instance's trusted root cannot be had by TUF; with no network,"
            f" give a file: {type(error).__name__} {error}"
        ) from error
