"""What the configuration says of Sigstore, put together: whom to trust, what to sign with.

The Sigstore libraries take 20 MB, so they are imported where the configuration asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from narseal.config import Config, CosignConfig, Who, is_pem
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignPublicKey
from narseal.custody import expand, read_private
from narseal.custody.operator import open_cosign_key
from narseal.errors import ConfigError, MalformedKey, Refused
from narseal.storage import Revoked
from narseal.telemetry import metrics

if TYPE_CHECKING:
    from narseal.cosign.identity import TokenSource
    from narseal.cosign.sign import Key, Signer
    from narseal.cosign.trust import Trust
    from narseal.cosign.verify import Verified, Verifier

_MAX_PUBLIC = 16 << 10
_FEW = 32


class SigstoreSetup:
    """Keys and files are read at once, so that mistakes show at the start; services later."""

    def __init__(self, config: CosignConfig) -> None:
        """ConfigError if a key, its password or a trust file cannot be used. Blocks."""
        self.config = config
        self.key: Key | None = None
        if config.mode == "key":
            assert config.key is not None  # the configuration saw to it
            self.key = open_cosign_key(config.key, config.password_file)
        self._trust = _load(Path(config.trust_config)) if config.trust_config else None
        self._signer: Signer | None = None

    @property
    def per_file(self) -> bool:
        """Whether files are signed on their own too."""
        if self.config.per_file == "auto":
            at_a_signer = (self.config.key or "").startswith("agent:")  # it may sign no files
            return self.config.mode == "key" and not self.config.log and not at_a_signer
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
        from narseal.cosign.sign import KeylessSigner, KeySigner

        config = self.config
        if self.key:
            with_log = self._instance() if config.log else None
            return KeySigner(self.key, with_log, timeout=config.timeout, observe=_observe)
        if config.mode == "off":
            raise ConfigError('cosign.mode is "off": there is nothing to sign with')
        source, name = token_source(config)
        return KeylessSigner(
            source,
            self._instance(),
            timeout=config.timeout,
            source=name,
            expected=config.identity,
            observe=_observe,
        )

    def _instance(self) -> Trust:
        if self._trust is None:
            self._trust = _public_instance()
        return self._trust


def _load(file: Path) -> Trust:
    from narseal.cosign import trust

    return trust.load(file)


def _public_instance() -> Trust:
    from narseal.cosign import trust

    return trust.public_instance()


def _observe(seconds: float, log_seconds: float) -> None:
    metrics.observe_verification("bundle", "good", seconds)
    if log_seconds:
        metrics.observe_verification("rekor", "good", log_seconds)


def verified(verifier: Verifier, data: bytes, digest: bytes) -> Verified:
    """What a stranger's bundle says of the file with this SHA-256, measured. Blocks.

    Refused or MalformedAttestation if it does not verify.
    """
    with metrics.verifying("bundle"):
        found = verifier.verify(Bundle.parse(data), digest)
    if found.log_index is not None:
        metrics.observe_verification("rekor", "good", found.log_seconds)
    return found


def signer_of(found: Verified, who: Who) -> str:
    """What to call whoever signed a verified bundle: a key's hint, or identity and issuer."""
    return found.signer if who.cosign_key else f"{found.signer} of {who.issuer}"


def check_not_revoked(found: Verified, who: Who, revoked: Revoked) -> None:
    """Refused if the key that signed is revoked, or the identity was when it signed."""
    if found.signer in revoked.cosign_keys:
        raise Refused("bad-bundle", "its key is revoked")
    if who.issuer and revoked.bars(found.signer, who.issuer, found.signed_at):
        raise Refused("bad-bundle", f"{found.signer} is revoked since before it was signed")


def read_public_key(key: str) -> CosignPublicKey:
    """A `cosign.pub`, by its path or as its text; ConfigError if it cannot be used."""
    try:
        if is_pem(key):
            return CosignPublicKey.parse(key.strip() + "\n")
        with Path(expand(key)).open(encoding="ascii") as opened:
            return CosignPublicKey.parse(opened.read(_MAX_PUBLIC))
    except (OSError, UnicodeDecodeError, MalformedKey) as error:
        raise ConfigError(f"{'cosign_key' if is_pem(key) else key}: {error}") from error


def token_source(config: CosignConfig) -> tuple[TokenSource, str]:
    """Where identity tokens come from, and what to call it."""
    from narseal.cosign import identity

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


class ExpectedSigners:
    """Verifiers of what those sign whom the configuration names."""

    def __init__(self, known: Iterable[Who], *, trust_config: str | None = None) -> None:
        """ConfigError if a key or trust file of `known` cannot be used. Blocks.

        `trust_config` is for those who name none; without it, the public Sigstore instance.
        """
        self._trust_config = trust_config
        self._verifiers: dict[Who, Verifier] = {}
        for who in known:
            if who.cosign_key or who.trust_config or trust_config:
                self.verifier(who)

    def verifier(self, who: Who) -> Verifier:
        """Of one of them. Blocks where the public instance's roots are still to be had."""
        if who not in self._verifiers:
            self._verifiers[who] = self._make(who)
        return self._verifiers[who]

    def _make(self, who: Who) -> Verifier:
        from narseal.cosign.verify import ByIdentity, ByKey, Verifier

        file = who.trust_config or (None if who.cosign_key else self._trust_config)
        known = _load(Path(expand(file))) if file else None
        if who.cosign_key:
            return Verifier(ByKey((read_public_key(who.cosign_key),)), known)
        assert who.identity  # the configuration saw to it
        assert who.issuer
        expected = ByIdentity(who.identity, who.issuer, is_regex=who.is_regex)
        return Verifier(expected, known or _public_instance())


def upstream_signers(config: Config) -> ExpectedSigners:
    """Who must have signed what upstreams with `verify = "bundle"` give."""
    return ExpectedSigners(u.who for u in config.upstream if u.verify == "bundle")
