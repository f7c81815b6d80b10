"""Holding a configuration to the files that it names, before anything serves with it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from narseal.config import Config, is_pem
from narseal.custody import expand, tokens
from narseal.custody.operator import OperatorKey
from narseal.errors import ConfigError
from narseal.nix.keys import PublicKey
from narseal.pipeline.services import load_keys
from narseal.pipeline.trust.policy import attesters, attesting_signers, known_keys
from narseal.pipeline.trust.sigstore import SigstoreSetup, upstream_signers
from narseal.server.tls import tls_context
from narseal.upstream.credentials import credentials

#: What the sockets and the index hang on.
_FIXED = ("listen", "workers", "store_dir", "storage.url", "storage.index", "metrics.listen")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a good configuration signs with."""

    keys: list[PublicKey]
    cosigning: SigstoreSetup
    #: Sentences on what is allowed, and hardly meant.
    warnings: list[str]


def check(config: Config) -> Checked:
    """ConfigError names the key or file that cannot be used. Blocks."""
    keys = load_keys(config)
    tls_context(config)
    for upstream in config.upstream:
        credentials(upstream, urlsplit(upstream.url).hostname or "")
    upstream_signers(config)
    attesting_signers(config)
    known_keys(config, {key.public.name for key in keys})
    if config.upload.tokens_file:
        tokens.listed(Path(expand(config.upload.tokens_file)))
    for key in keys:
        key.custodian.close()  # what is forked from here has no use for it
    return Checked(
        [key.public for key in keys], SigstoreSetup(config.cosign), list(_warnings(config, keys))
    )


def _warnings(config: Config, keys: Collection[OperatorKey]) -> Iterator[str]:
    now = datetime.now(UTC)
    if not any(key.is_active(now) for key in keys):
        yield (
            "no [[signing.key]] is active now, by its not_before and not_after: what is not signed"
            " yet is not served"
        )
    file = config.upload.tokens_file
    if file and not Path(expand(file)).exists():
        yield (
            f"upload.tokens_file {file} is not there, so nobody has a token:"
            f" `narseal token add NAME --allow '*' --tokens-file {file}` makes it"
        )
    variable = config.cosign.identity_token_env
    if config.cosign.mode == "keyless" and variable and variable not in os.environ:
        yield f"cosign.identity_token_env: {variable} is not set here; narseal needs it where it serves"
    if config.policy_default == "deny" and not any(rule.action != "deny" for rule in config.policy):
        yield 'policy_default = "deny", and no [[policy]] lets anything through: nothing is served'


def check_change(old: Config, new: Config) -> None:
    """ConfigError if a setting changed that only a restart can change."""
    for name in _FIXED:
        before, after = (_setting(config, name) for config in (old, new))
        if before != after:
            raise ConfigError(f"{name} changed from {before} to {after}: that needs a restart")


def named_files(config: Config) -> Iterator[Path]:
    """The files of keys and trust, whose change is a change of the configuration."""
    cosign = config.cosign
    urls = [*(key.url for key in config.signing.key), cosign.key or ""]
    texts: list[str | None] = [u.removeprefix("file:") for u in urls if u.startswith("file:")]
    texts += [cosign.password_file, cosign.trust_config]
    signers = [who for who, _ in attesters(config)]
    signers += [u.who for u in config.upstream if u.verify == "bundle"]
    for who in signers:
        texts += [who.trust_config]
        if who.cosign_key and not is_pem(who.cosign_key):
            texts += [who.cosign_key]
    if config.tls:
        texts += [config.tls.certificate, config.tls.key]
    for text in texts:
        if text:
            yield Path(expand(text))


def _setting(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
