"""What the configuration says of Sigstore, put together: whom to trust, what to sign with."""

from __future__ import annotations

from pathlib import Path

from narseal.config import Config, CosignConfig, UpstreamConfig
from narseal.cosign import identity, trust
from narseal.cosign.identity import TokenSource
from narseal.cosign.keys import CosignKey, CosignPublicKey
from narseal.cosign.sign import KeylessSigner, KeySigner, Signer
from narseal.cosign.trust import Trust
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.custody import expand, read_private
from narseal.errors import ConfigError, MalformedKey
from narseal.telemetry import metrics

_MAX_PUBLIC = 16 << 10
_FEW = 32


class Cosigning:
    """Keys and files are read at once, so that mistakes show at the start; services later."""

    def __init__(self, config: CosignConfig) -> None:
        """ConfigError if a key, its password or a trust file cannot be used. Blocks."""
        self.config = config
        self.key = load_key(config) if config.mode == "key" else None
        self._trust = trust.load(Path(config.trust_config)) if config.trust_config else None
        self._signer: Signer | None = None

    @property
    def per_file(self) -> bool:
        """Whether files are signed on their own too."""
        if self.config.per_file == "auto":
            return self.config.mode == "key" and not self.config.log
        return self.config.per_file == "yes"

    @property
    def batch_subjects(self) -> int:
        """Digests in one batch: few where each file costs a log entry too, so little is done twice."""
        most = self.config.batch_max_subjects
        costly = self.config.mode == "keyless" or self.config.log
        return min(most, _FEW) if self.per_file and costly else most

    @property
    def trusted_root(self) -> bytes | None:
        """The trusted root with which clients verify; None if they need none, or know it."""
        return self._trust.root_json if self._trust else None

    def signer(self) -> Signer:
        """The signer. Blocks: the public instance's roots come over the network the first time."""
        if self._signer is None:
            self._signer = self._make()
        return self._signer

    def _make(self) -> Signer:
        config = self.config
        if self.key:
            with_log = self._instance() if config.log else None
            return KeySigner(self.key, with_log, timeout=config.timeout, observe=_observe)
        if config.mode == "off":
            raise ConfigError('cosign.mode is "off": there is nothing to sign with')
        source, name = token_source(config)
        return KeylessSigner(
            source, self._instance(), timeout=config.timeout, source=name, observe=_observe
        )

    def _instance(self) -> Trust:
        if self._trust is None:
            self._trust = trust.public_instance()
        return self._trust


def _observe(seconds: float, log_seconds: float) -> None:
    metrics.observe_verification("bundle", "good", seconds)
    if log_seconds:
        metrics.observe_verification("rekor", "good", log_seconds)


def load_key(config: CosignConfig) -> CosignKey:
    """The encrypted key of the configuration; ConfigError names the file and what is wrong."""
    assert config.key is not None  # the configuration saw to it
    file = expand(config.key.removeprefix("file:"))
    password = read_private(Path(expand(config.password_file))) if config.password_file else ""
    try:
        return CosignKey.parse(read_private(Path(file)), password.rstrip("\r\n").encode())
    except MalformedKey as error:
        hint = "" if config.password_file else " (no password_file is set)"
        raise ConfigError(f"{file}: {error}{hint}") from error


def read_public_key(file: Path) -> CosignPublicKey:
    """A `cosign.pub`; ConfigError if it cannot be used."""
    try:
        with file.open(encoding="ascii") as opened:
            return CosignPublicKey.parse(opened.read(_MAX_PUBLIC))
    except (OSError, UnicodeDecodeError, MalformedKey) as error:
        raise ConfigError(f"{file}: {error}") from error


def token_source(config: CosignConfig) -> tuple[TokenSource, str]:
    """Where identity tokens come from, and what to call it."""
    if config.identity_token_file:
        file = config.identity_token_file
        return identity.from_file(Path(expand(file))), file
    if config.identity_token_env:
        variable = config.identity_token_env
        return identity.from_environment(variable), f"${variable}"
    if config.oidc_issuer:
        assert config.oidc_client_id  # the configuration saw to it
        assert config.oidc_client_secret_file
        secret = Path(expand(config.oidc_client_secret_file))
        source = identity.from_client_credentials(
            config.oidc_issuer,
            config.oidc_client_id,
            lambda: read_private(secret).strip(),
            timeout=config.timeout,
        )
        return source, config.oidc_issuer
    return identity.ambient, "the CI system"


class UpstreamSigners:
    """Who must have signed what an upstream with `verify = "bundle"` gives."""

    def __init__(self, config: Config) -> None:
        """ConfigError if a key or trust file cannot be used. Blocks."""
        self._configs = {u.url: u for u in config.upstream if u.verify == "bundle"}
        self._verifiers = {
            upstream.url: _upstream_verifier(upstream)
            for upstream in self._configs.values()
            if upstream.trust_config or upstream.cosign_key
        }

    def verifier(self, url: str) -> Verifier:
        """The upstream's. Blocks where the public instance's roots are still to be had."""
        if url not in self._verifiers:
            self._verifiers[url] = _upstream_verifier(self._configs[url])
        return self._verifiers[url]


def _upstream_verifier(config: UpstreamConfig) -> Verifier:
    known = trust.load(Path(config.trust_config)) if config.trust_config else None
    if config.cosign_key:
        return Verifier(ByKey((read_public_key(Path(expand(config.cosign_key))),)), known)
    identity_ = config.identity or config.identity_regex
    assert identity_  # the configuration saw to it
    assert config.issuer
    expected = ByIdentity(identity_, config.issuer, is_regex=config.identity is None)
    return Verifier(expected, known or trust.public_instance())
