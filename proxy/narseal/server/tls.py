"""The server's TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from narseal.config import Config
from narseal.errors import ConfigError
from narseal.runtime.files import check_not_public


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The server's TLS, if it is configured; ConfigError if its files cannot be used."""
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        check_not_public(Path(config.tls.key))
        context.load_cert_chain(config.tls.certificate, config.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls: {config.tls.certificate}, {config.tls.key}: {error}") from error
    return context
