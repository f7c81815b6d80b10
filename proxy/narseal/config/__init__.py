"""The configuration: one TOML text, every key also an environment variable, unknown keys are errors.

Environment: `NARSEAL_SECTION__KEY`, over the file; lists and tables as JSON. Secrets are never
values here, only paths of files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, AwareDatetime, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from narseal.config.location import sentences
from narseal.config.policy import (
    SIGNATURE,
    AcceptConfig,
    AttestationsConfig,
    PolicyConfig,
    RequirementConfig,
    predicate_type,
)
from narseal.config.sections import Section, SignerSection, Who, is_pem
from narseal.config.values import Duration, Key, Listen, NameGlob, Size, with_scheme
from narseal.errors import ConfigError
from narseal.nix.name_globs import covers
from narseal.nix.store_path import check_store_dir

__all__ = [
    "SIGNATURE",
    "AcceptConfig",
    "AttestationsConfig",
    "Config",
    "CosignConfig",
    "LimitsConfig",
    "LogConfig",
    "MetricsConfig",
    "OidcConfig",
    "PolicyConfig",
    "RequirementConfig",
    "SigningConfig",
    "SigningKeyConfig",
    "StorageConfig",
    "TlsConfig",
    "UploadConfig",
    "UpstreamConfig",
    "Who",
    "is_pem",
    "predicate_type",
]

ENV_PREFIX = "NARSEAL_"
_KEY_URL = r"^(file|agent|pkcs11):.+"


class UpstreamConfig(SignerSection):
    """`[[upstream]]`: a binary cache that narseal stands in front of.

    With `verify = "bundle"` it says who must have signed each NAR.
    """

    url: Annotated[str, with_scheme("http", "https", "file")]
    #: In metrics; the host or the folder's name if it is not given.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{0,64}$")] = ""
    public_keys: tuple[Key, ...] = ()
    verify: Literal["signature", "content", "bundle"] = "signature"
    sign_when: Literal["evidence", "content"] = "evidence"
    #: Lower is asked first.
    priority: int = 40
    #: After this the next upstream is asked as well.
    hedge_after: Duration = 0.5
    connect_timeout: Duration = 5.0
    #: For one narinfo or other small file.
    timeout: Duration = 30.0
    #: A NAR that brings no byte for so long is taken up elsewhere.
    stall_timeout: Duration = 30.0
    #: Origins besides its own that it may redirect to even at private addresses.
    redirect_origins: tuple[Annotated[str, with_scheme("http", "https")], ...] = ()
    netrc_file: str | None = None
    headers_file: str | None = None

    @property
    def label(self) -> str:
        """A short name without secrets or paths."""
        parts = urlsplit(self.url)
        return self.name or parts.netloc or parts.path.rpartition("/")[2]

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if self.verify == "signature" and not self.public_keys:
            raise ValueError(
                'public_keys is empty: name the upstream\'s key, or set verify = "content"'
                " for an unsigned upstream that you trust"
            )
        if self.verify == "bundle" and not self.names_signer:
            raise ValueError(
                'verify = "bundle" needs to know who signs: identity and issuer, or cosign_key'
            )
        names = [key.name for key in self.public_keys]
        if len(set(names)) < len(names):
            raise ValueError("two public_keys have the same name")
        return self


class StorageConfig(Section):
    """`[storage]`: where verified files and the index are."""

    url: Annotated[str, with_scheme("file")] = "file:///var/lib/narseal/cache"
    index: Annotated[str, with_scheme("sqlite")] = "sqlite:////var/lib/narseal/index.sqlite"
    #: Keep and serve NARs that come as xz or bzip2 as zstd.
    recompress: bool = False
    recompress_level: Annotated[int, Field(ge=1, le=19)] = 3
    #: A stored NAR that was not hashed for so long is hashed before it is served.
    reverify_after: Duration = 30 * 86400.0
    #: Bytes a second of stored NARs that are hashed in the background; 0: none.
    scrub_rate: Size = 16 << 20


class SigningKeyConfig(Section):
    """`[[signing.key]]`: one of the operator's substituter keys."""

    #: Where it is: `file:`, `agent:` (a `narseal signer`) or `pkcs11:`.
    url: Annotated[str, Field(pattern=_KEY_URL)]
    not_before: AwareDatetime | None = None
    not_after: AwareDatetime | None = None

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.not_before and self.not_after and self.not_before >= self.not_after:
            raise ValueError(
                f"it never signs: not_before {self.not_before.isoformat()} is not before not_after"
                f" {self.not_after.isoformat()}"
            )
        return self


class SigningConfig(Section):
    """`[signing]`."""

    key: tuple[SigningKeyConfig, ...] = ()
    #: Admitted paths a second that get the signatures of keys that came later.
    resign_rate: Annotated[float, Field(gt=0)] = 200.0


class CosignConfig(Section):
    """`[cosign]`: Sigstore signatures on what was verified by content."""

    mode: Literal["off", "key", "keyless"] = "off"
    #: With mode "key": an encrypted cosign.key (`file:`), or a key elsewhere (`agent:`, `pkcs11:`).
    key: Annotated[str, Field(pattern=_KEY_URL)] | None = None
    password_file: str | None = None
    #: A private Sigstore instance; without it, the public one by TUF.
    trust_config: str | None = None
    #: With mode "key": enter signatures into the instance's log, and have them timestamped.
    log: bool = False
    #: With mode "keyless", one source of identity tokens; none: the CI system that this runs in.
    identity_token_file: str | None = None
    identity_token_env: str | None = None
    oidc_issuer: Annotated[str, with_scheme("http", "https")] | None = None
    oidc_client_id: str | None = None
    oidc_client_secret_file: str | None = None
    #: With mode "keyless": whom certificates must name; without it, whoever the token is for.
    identity: Annotated[str, Field(min_length=1)] | None = None
    #: Digests in one statement; stock cosign verifies up to 1,024.
    batch_max_subjects: Annotated[int, Field(ge=2, le=1024)] = 1024
    #: How long a path waits for others to fill its batch.
    batch_max_age: Duration = 30.0
    #: Put the head of each signer's audit log into every batch.
    anchor_audit: bool = False
    #: Sign each file on its own too; auto: where that needs no service.
    per_file: Literal["auto", "yes", "no"] = "auto"
    #: For one answer of one service.
    timeout: Annotated[Duration, Field(ge=0.1)] = 30.0
    #: Longest pause before a failed batch is tried again.
    retry_max: Annotated[Duration, Field(ge=0.1)] = 300.0

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.mode == "key" and self.key is None:
            raise ValueError(
                'mode = "key" needs key = "file:/path/cosign.key"; `narseal key generate --cosign`'
                " makes one"
            )
        if self.identity and self.mode == "key":
            raise ValueError('identity is of certificates, which mode = "key" does not use')
        sources = (self.identity_token_file, self.identity_token_env, self.oidc_issuer)
        if sum(source is not None for source in sources) > 1:
            raise ValueError(
                "more than one source of identity tokens: keep one of identity_token_file,"
                " identity_token_env and oidc_issuer"
            )
        if self.oidc_issuer and not (self.oidc_client_id and self.oidc_client_secret_file):
            raise ValueError("oidc_issuer needs oidc_client_id and oidc_client_secret_file")
        return self


class OidcConfig(Section):
    """`[[upload.oidc]]`: tokens of a CI system that may upload."""

    issuer: Annotated[str, with_scheme("http", "https")]
    audience: Annotated[str, Field(min_length=1)]
    #: The exact `sub`.
    identity: str | None = None
    #: Other claims, each compared exactly.
    claims: dict[str, str | int | bool] = Field(default={})
    #: Globs on store path names.
    allow: tuple[NameGlob, ...] = ()

    @model_validator(mode="after")
    def _names_somebody(self) -> Self:
        if not self.identity and not self.claims:
            raise ValueError("identity or claims: else everybody of that issuer could upload")
        return self


class UploadConfig(Section):
    """`[upload]`: what `nix copy --to` may bring."""

    enabled: bool = False
    #: Made by `narseal token add`.
    tokens_file: str | None = None
    oidc: tuple[OidcConfig, ...] = ()
    #: A path that one of these signed is taken from any token.
    trusted_keys: tuple[Key, ...] = ()
    #: Largest NAR file, as it is uploaded.
    nar_size: Size = 16 << 30
    #: Uploaded NARs that wait for their narinfos: bytes of all, and how long.
    quarantine_size: Size = 64 << 30
    quarantine_age: Duration = 86400.0
    #: Uploaded logs, listings and debug-info pointers: bytes on disk of all that are served.
    side_files: Size = 4 << 30
    #: A body that brings no byte for so long, or less than limits.least_rate over it, is cut off.
    stall_timeout: Duration = 60.0
    #: What becomes of a path whose NAR does not contain what it refers to.
    references: Literal["warn", "refuse"] = "warn"
    #: Reading needs a token too.
    private: bool = False

    @model_validator(mode="after")
    def _has_tokens(self) -> Self:
        if (self.enabled or self.private) and not self.tokens_file and not self.oidc:
            raise ValueError(
                "tokens_file is not set, nor an [[upload.oidc]]; `narseal token add` makes tokens"
            )
        return self


class LimitsConfig(Section):
    """`[limits]`: bounds on what comes from outside."""

    #: Largest NAR, decompressed, whatever its narinfo says.
    nar_size: Size = 64 << 30
    #: Bytes of finished answers (narinfos, small NARs) that each worker keeps in memory.
    hot_map: Size = 32 << 20
    #: How long "nobody has it" is remembered.
    negative_ttl: Duration = 60.0
    negative_entries: Annotated[int, Field(ge=0)] = 50_000
    #: How long a narinfo may wait for its NAR where content comes first (Nix waits 300 s).
    content_hold: Annotated[Duration, Field(le=280)] = 240.0
    #: NARs that each worker fetches from one upstream at a time.
    transfers: Annotated[int, Field(ge=1)] = 64
    #: Bytes a second below which a NAR is taken up elsewhere (64 times as many if nobody reads it),
    #: and an upload is cut off.
    least_rate: Size = 1 << 10
    #: Narinfos that each worker asks one upstream for at a time.
    lookups: Annotated[int, Field(ge=1)] = 256
    #: Largest log, listing or other side file.
    side_file: Size = 64 << 20
    #: Bytes of upstreams' side files, which nobody signed, that are kept on disk.
    side_files: Size = 1 << 30
    connections: Annotated[int, Field(ge=1)] = 4096
    connections_per_address: Annotated[int, Field(ge=1)] = 1024
    #: For the whole head of a request to arrive.
    header_timeout: Duration = 10.0
    keepalive_timeout: Duration = 75.0
    #: A reader who takes nothing for so long is cut off.
    send_timeout: Duration = 300.0
    #: Running downloads may take so long at shutdown.
    shutdown_timeout: Duration = 30.0


class TlsConfig(Section):
    """`[tls]`: PEM files; without it narseal speaks plain HTTP."""

    certificate: str
    key: str


class LogConfig(Section):
    """`[log]`: JSON lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    #: One line for every request, too.
    access: bool = False


class MetricsConfig(Section):
    """`[metrics]`: without `listen`, /metrics is on the main port for loopback callers."""

    listen: Listen | None = None


class Config(BaseSettings):
    """The whole configuration; see docs/operating.md for every key."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    listen: Listen = "127.0.0.1:8080"
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    store_dir: Annotated[str, AfterValidator(check_store_dir)] = "/nix/store"
    priority: Annotated[int, Field(ge=0, le=1_000_000)] = 30
    #: What is brought in advance: the narinfos to which a path refers; and, once a client fetches a NAR, the small
    #: NARs of the narinfos that it asked for.
    prefetch: Literal["nars", "references", "off"] = "nars"
    upstream: tuple[UpstreamConfig, ...] = ()
    storage: StorageConfig = StorageConfig()
    signing: SigningConfig = SigningConfig()
    cosign: CosignConfig = CosignConfig()
    upload: UploadConfig = UploadConfig()
    policy: tuple[PolicyConfig, ...] = ()
    #: For paths that no rule is about.
    policy_default: Literal["allow", "deny"] = "allow"
    attestations: AttestationsConfig = AttestationsConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes over the file; there are no other sources."""
        return env_settings, init_settings

    @model_validator(mode="after")
    def _each_rule_decides(self) -> Self:
        for number, rule in enumerate(self.policy):
            for before, earlier in enumerate(self.policy[:number]):
                if covers(earlier.match, rule.match):
                    raise ValueError(
                        f"policy[{number}] ({', '.join(rule.match)}) never decides: the first rule"
                        f" that matches does, and policy[{before}] ({', '.join(earlier.match)})"
                        " matches all of it; put the narrower rule first"
                    )
        return self

    @model_validator(mode="after")
    def _distinct_upstreams(self) -> Self:
        urls = [upstream.url for upstream in self.upstream]
        if len(set(urls)) < len(urls):
            raise ValueError("two upstreams have the same url")
        return self

    @classmethod
    def parse(
        cls, text: str, *, environ: Mapping[str, str], source: str = "narseal.toml"
    ) -> Config:
        """The configuration of a TOML text and the process's own environment.

        ConfigError names `source`, the line where there is one, the key and the reason.
        """
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: not TOML: {error}") from error
        variables = {
            name.removeprefix(ENV_PREFIX).lower(): name
            for name in environ
            if name.startswith(ENV_PREFIX)
        }
        for setting, name in variables.items():
            if setting.partition("__")[0] not in cls.model_fields:
                raise ConfigError(f"{name}: there is no such setting")
        try:
            return cls(**tree)
        except ValidationError as error:
            raise ConfigError("\n".join(sentences(error, text, source, variables))) from error
        except (ValueError, TypeError) as error:  # pydantic-settings: JSON in the environment
            names = [name for setting, name in variables.items() if f'"{setting}"' in str(error)]
            raise ConfigError(
                f"{' '.join(names) or error}: not JSON. A list or section of the environment is, as"
                """ NARSEAL_UPSTREAM='[{"url": "https://…"}]'; one setting is NARSEAL_SECTION__KEY"""
            ) from error
