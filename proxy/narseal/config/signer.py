"""The configuration of `narseal signer`: a file of its own, which the proxy cannot read."""

from __future__ import annotations

import tomllib
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from narseal.config.location import sentences
from narseal.config.sections import Section
from narseal.config.values import Duration, Key, NameGlob, with_scheme
from narseal.errors import ConfigError
from narseal.nix.store_path import check_store_dir


class SignerKeyConfig(Section):
    """`[[key]]`: a substituter key."""

    url: Annotated[str, Field(pattern=r"^(file|pkcs11):.+")]


class SignerCosignKeyConfig(Section):
    """`[[cosign_key]]`: a cosign key, and what the proxy calls it."""

    url: Annotated[str, Field(pattern=r"^(file|pkcs11):.+")]
    name: Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,64}$")] = "cosign"
    password_file: str | None = None


class AuditConfig(Section):
    """`[audit]`: where each signature is written down before it leaves."""

    log: str
    #: A key made by `narseal key generate`, which signs checkpoints and nothing else.
    key: Annotated[str, Field(pattern=r"^file:.+")]
    checkpoint: Annotated[Duration, Field(ge=1)] = 3600.0


class SignerConfig(Section):
    """What is signed, for whom, and how often."""

    listen: Annotated[str, Field(pattern=r"^(unix:/.+|systemd)$")] = "unix:/run/narseal/signer.sock"
    #: Users who may ask; without any, only the signer's own.
    allow_users: tuple[str, ...] = ()
    store_dir: Annotated[str, AfterValidator(check_store_dir)] = "/nix/store"
    #: A path that one of these signed, the upstreams', is signed.
    trusted_keys: tuple[Key, ...] = ()
    #: Globs on names of paths that are signed on their content alone, once the signer hashed it …
    content: tuple[NameGlob, ...] = ()
    #: … in this folder, the proxy's storage.
    storage: Annotated[str, with_scheme("file")] | None = None
    #: Sign narseal's own statements with the cosign keys.
    statements: bool = True
    #: Sign SHA-256 digests of files with the cosign keys.
    blobs: bool = False
    #: Signatures a second, and a day; 0: no bound.
    rate: Annotated[int, Field(ge=0)] = 0
    per_day: Annotated[int, Field(ge=0)] = 0
    key: tuple[SignerKeyConfig, ...] = ()
    cosign_key: tuple[SignerCosignKeyConfig, ...] = ()
    audit: AuditConfig

    @classmethod
    def parse(cls, text: str, *, source: str = "signer.toml") -> SignerConfig:
        """ConfigError names `source`, the line where there is one, the key and the reason."""
        try:
            return cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: not TOML: {error}") from error
        except ValidationError as error:
            raise ConfigError("\n".join(sentences(error, text, source))) from error
