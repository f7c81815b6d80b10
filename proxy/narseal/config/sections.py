"""What several sections of the configuration share: strictness, and who must have signed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A table of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def is_pem(key: str) -> bool:
    """Whether a `cosign_key` is the key's own text, not the path of its file."""
    return key.lstrip().startswith("-----")


@dataclass(frozen=True, slots=True)
class Who:
    """One who signs with Sigstore: a key, or an identity that an issuer vouches for."""

    #: A cosign.pub: its path, or the PEM text itself. None: `identity` and `issuer` are set.
    cosign_key: str | None
    identity: str | None
    issuer: str | None
    #: `identity` is a regular expression that must match the whole name.
    is_regex: bool
    #: A trusted root or trust config; None: the default.
    trust_config: str | None

    def __str__(self) -> str:
        if self.cosign_key:
            return "a cosign key" if is_pem(self.cosign_key) else self.cosign_key
        return f"{self.identity} of {self.issuer}"


class SignerSection(Section):
    """Who must have signed, by certificate or by key."""

    #: Exactly who, by certificate …
    identity: str | None = None
    #: … or anybody whose whole name matches,
    identity_regex: str | None = None
    issuer: str | None = None
    #: … or by key: a cosign.pub, or its text.
    cosign_key: str | None = None
    #: A trusted root or trust config.
    trust_config: str | None = None

    @property
    def names_signer(self) -> bool:
        """Whether it says who, in one way and not in two."""
        named = self.identity or self.identity_regex
        if self.cosign_key:
            return not named and not self.issuer
        return bool(named and self.issuer)

    @property
    def who(self) -> Who:
        """The signer; only where `names_signer`."""
        return Who(
            self.cosign_key,
            self.identity or self.identity_regex,
            self.issuer,
            is_regex=self.identity is None and self.identity_regex is not None,
            trust_config=self.trust_config,
        )

    @model_validator(mode="after")
    def _one_spelling(self) -> Self:
        if self.identity and self.identity_regex:
            raise ValueError("identity and identity_regex exclude each other")
        if self.identity_regex:
            try:
                re.compile(self.identity_regex)
            except re.error as error:
                raise ValueError(f"identity_regex is no regular expression: {error}") from error
        return self
