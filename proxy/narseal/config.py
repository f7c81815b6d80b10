"""The configuration: one TOML text, every key also an environment variable, unknown keys are errors.

Environment: `NARSEAL_SECTION__KEY`, over the file; lists and tables as JSON. Secrets are never
values here, only paths of files.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from narseal.errors import ConfigError, MalformedKey
from narseal.nix.keys import PublicKey
from narseal.nix.store_path import check_store_dir

ENV_PREFIX = "NARSEAL_"

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


def _url(*schemes: str) -> AfterValidator:
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class UpstreamConfig(_Section):
    """`[[upstream]]`: a binary cache that narseal stands in front of."""

    url: Annotated[str, _url("http", "https", "file")]
    #: In metrics; the host or the folder's name if it is not given.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{0,64}$")] = ""
    public_keys: tuple[Key, ...] = ()
    verify: Literal["signature", "content"] = "signature"
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
    redirect_origins: tuple[Annotated[str, _url("http", "https")], ...] = ()
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
        names = [key.name for key in self.public_keys]
        if len(set(names)) < len(names):
            raise ValueError("two public_keys have the same name")
        return self


class StorageConfig(_Section):
    """`[storage]`: where verified files and the index are."""

    url: Annotated[str, _url("file")] = "file:///var/lib/narseal/cache"
    index: Annotated[str, _url("sqlite")] = "sqlite:////var/lib/narseal/index.sqlite"
    #: Keep and serve NARs that come as xz or bzip2 as zstd.
    recompress: bool = False
    recompress_level: Annotated[int, Field(ge=1, le=19)] = 3


class SigningKeyConfig(_Section):
    """`[[signing.key]]`: one of the operator's substituter keys."""

    url: Annotated[str, Field(pattern=r"^file:.+")]
    not_after: datetime | None = None


class SigningConfig(_Section):
    """`[signing]`."""

    key: tuple[SigningKeyConfig, ...] = ()


class LimitsConfig(_Section):
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
    #: NARs that each worker fetches at a time.
    transfers: Annotated[int, Field(ge=1)] = 64
    #: Narinfos, logs and other small things that each worker asks for at a time.
    lookups: Annotated[int, Field(ge=1)] = 256
    #: Largest log, listing or other side file.
    side_file: Size = 64 << 20
    connections: Annotated[int, Field(ge=1)] = 4096
    connections_per_address: Annotated[int, Field(ge=1)] = 1024
    #: For the whole head of a request to arrive.
    header_timeout: Duration = 10.0
    keepalive_timeout: Duration = 75.0
    #: A reader who takes nothing for so long is cut off.
    send_timeout: Duration = 300.0
    #: Running downloads may take so long at shutdown.
    shutdown_timeout: Duration = 30.0


class TlsConfig(_Section):
    """`[tls]`: PEM files; without it narseal speaks plain HTTP."""

    certificate: str
    key: str


class LogConfig(_Section):
    """`[log]`: JSON lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    #: One line for every request, too.
    access: bool = False


class MetricsConfig(_Section):
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
    upstream: tuple[UpstreamConfig, ...] = ()
    storage: StorageConfig = StorageConfig()
    signing: SigningConfig = SigningConfig()
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
        for name in environ:
            section = name.removeprefix(ENV_PREFIX).partition("__")[0].lower()
            if name.startswith(ENV_PREFIX) and section not in cls.model_fields:
                raise ConfigError(f"{name}: there is no such setting")
        try:
            return cls(**tree)
        except ValidationError as error:
            raise ConfigError("\n".join(_sentences(error, text, source))) from error
        except (ValueError, TypeError) as error:  # pydantic-settings: JSON in the environment
            raise ConfigError(f"environment: {error}") from error


def _sentences(error: ValidationError, text: str, source: str) -> list[str]:
    sentences = []
    for item in error.errors(include_url=False):
        loc = list(item["loc"])
        line = find_line(text, loc)
        where = f"{source}, line {line}" if line else source
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
        sentences.append(f"{where}: {_dotted(loc)}: {message}" if loc else f"{where}: {message}")
    return sentences


def _dotted(loc: list[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


def find_line(text: str, loc: list[str | int]) -> int | None:
    """The line (from 1) of a TOML text where the key at `loc` stands, or the table that misses it."""
    tables = [p for p in loc if isinstance(p, str)]
    index = next((p for p in loc if isinstance(p, int)), 0)
    current: list[str] = []
    seen: dict[str, int] = {}
    best: int | None = None
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[\[?\s*([\w.\s\"-]+?)\s*\]\]?", line)
        key = re.match(r"\s*([\w-]+)\s*=", line)
        if header:
            name = header[1]
            current = name.split(".")
            seen[name] = seen.get(name, -1) + 1
        if current == tables[: len(current)] and seen.get(".".join(current), 0) == (
            index if current else 0
        ):
            if header:
                best = number
            elif key and [*current, key[1]] == tables[: len(current) + 1]:
                return number
    return best
