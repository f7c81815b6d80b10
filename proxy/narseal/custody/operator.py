"""The operator's keys, wherever each is: `file:`, `agent:`, `pkcs11:`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from narseal.config import SigningKeyConfig
from narseal.cosign.keys import CosignKey
from narseal.custody.agent import AgentCosignKey, AgentKey
from narseal.custody.file import FileKey, expand, read_private
from narseal.custody.requests import Request
from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import PublicKey, Signature

if TYPE_CHECKING:
    from narseal.cosign.sign import Key


class Custodian(Protocol):
    """One substituter key."""

    @property
    def public(self) -> PublicKey:
        """Its other half, with its name."""

    async def sign(self, request: Request) -> Signature:
        """The signature over what was verified; Refused if it will not, Unavailable if it cannot."""

    async def note(self, kind: str, name: str, reason: str) -> None:
        """Write a revocation into the audit log, where there is one."""

    def close(self) -> None:
        """Let go of the key."""


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """A substituter key, and when it signs."""

    custodian: Custodian
    not_before: datetime | None
    not_after: datetime | None

    @property
    def public(self) -> PublicKey:
        """Its other half."""
        return self.custodian.public

    def is_active(self, now: datetime) -> bool:
        """Whether it signs at a time."""
        begun = self.not_before is None or self.not_before <= now
        return begun and (self.not_after is None or now < self.not_after)

    @classmethod
    def open(cls, config: SigningKeyConfig) -> OperatorKey:
        """ConfigError if the key cannot be had. Blocks."""
        return cls(_custodian(config.url), config.not_before, config.not_after)


def _custodian(url: str) -> Custodian:
    if url.startswith("agent:"):
        return AgentKey(url)
    if url.startswith("pkcs11:"):
        from narseal.custody.pkcs11 import Pkcs11Key

        return Pkcs11Key(url)
    return FileKey.load(url)


def open_cosign_key(url: str, password_file: str | None) -> Key:
    """A cosign key at `file:`, `agent:` or `pkcs11:`; ConfigError if it cannot be had. Blocks."""
    if url.startswith("agent:"):
        return AgentCosignKey(url)
    if url.startswith("pkcs11:"):
        from narseal.custody.pkcs11 import Pkcs11CosignKey

        return Pkcs11CosignKey(url)
    file = expand(url.removeprefix("file:"))
    password = read_private(Path(expand(password_file))) if password_file else ""
    try:
        return CosignKey.parse(read_private(Path(file)), password.rstrip("\r\n").encode())
    except MalformedKey as error:
        hint = "" if password_file else " (no password_file is set)"
        raise ConfigError(f"{file}: {error}{hint}") from error
