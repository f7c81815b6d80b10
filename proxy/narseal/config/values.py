"""Values of the configuration that TOML has no type for: sizes, durations, addresses, keys, URLs."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from narseal.errors import MalformedKey
from narseal.nix.keys import PublicKey
from narseal.nix.name_globs import check_name_glob

_SIZE = re.compile(r"([0-9]{1,12})([KMGT]?)", re.ASCII)
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _size(value: object) -> object:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and not match:
        raise ValueError('not a size like "500G" (K, M, G, T are powers of 1024)')
    return int(match[1]) << (10 * " KMGT".index(match[2] or " ")) if match else value


def _duration(value: object) -> object:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and not match:
        raise ValueError('not a duration like "250ms", "30s", "15m", "1h", "7d"')
    return float(match[1]) * _SECONDS[match[2]] if match else value


def _listen(value: str) -> str:
    if value == "systemd" or (value.startswith("unix:/") and len(value) > 6):
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError('not "host:port", "unix:/path" or "systemd"')
    return value


def _public_key(value: object) -> object:
    try:
        return PublicKey.parse(value) if isinstance(value, str) else value
    except MalformedKey as error:
        raise ValueError(
            f"{error}; give it as `nix key convert-secret-to-public` prints it"
        ) from error


def with_scheme(*schemes: str) -> AfterValidator:
    """A URL with one of the schemes, without a query or a password."""

    def check(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes:
            raise ValueError(
                f"the URL must begin with one of: {', '.join(s + ':' for s in schemes)}"
            )
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError(
                "no query, fragment or password in a URL; credentials go into netrc_file"
            )
        if parts.scheme in ("http", "https") and not parts.hostname:
            raise ValueError("the URL has no host")
        if parts.scheme in ("file", "sqlite") and (parts.netloc or not parts.path.startswith("/")):
            raise ValueError(f"the URL needs an absolute path: {parts.scheme}:///var/lib/…")
        return value.rstrip("/")

    return AfterValidator(check)


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0)]
Listen = Annotated[str, AfterValidator(_listen)]
Key = Annotated[PublicKey, BeforeValidator(_public_key)]
NameGlob = Annotated[str, AfterValidator(check_name_glob)]
