"""Credentials for an upstream, from a netrc file or a file of header lines; never logged."""

from __future__ import annotations

import base64
import netrc
import re
from pathlib import Path

from narseal.config import UpstreamConfig
from narseal.errors import ConfigError
from narseal.runtime.files import check_not_public

_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([!-~][ -~]*)", re.ASCII)


def credentials(config: UpstreamConfig, host: str) -> dict[str, str]:
    """The headers that go with every request to the upstream's own origin, and to no other."""
    headers: dict[str, str] = {}
    if config.netrc_file:
        headers |= _from_netrc(config.netrc_file, host)
    if config.headers_file:
        headers |= _from_lines(config.headers_file)
    return headers


def _from_netrc(file: str, host: str) -> dict[str, str]:
    try:
        check_not_public(Path(file))
        entry = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError) as error:
        raise ConfigError(f"netrc_file {file}: {error}") from error
    if entry is None:
        raise ConfigError(f"netrc_file {file}: no entry for machine {host}")
    login, _, password = entry
    token = base64.b64encode(f"{login or ''}:{password or ''}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


def _from_lines(file: str) -> dict[str, str]:
    try:
        check_not_public(Path(file))
        lines = Path(file).read_text("ascii").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"headers_file {file}: {error}") from error
    headers = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            match = _HEADER.fullmatch(line.strip())
            if not match:
                raise ConfigError(f"headers_file {file}, line {number}: not `Name: value`")
            headers[match[1]] = match[2]
    return headers
