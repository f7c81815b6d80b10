"""Making bundles: with a key, a key and a log, or keyless.

Each signer blocks, for up to a few times its timeout where there is a network: call it in a
thread. What it returns was verified by the very verifier that others use.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any, Protocol

import requests
from requests import PreparedRequest, Response
from requests.adapters import HTTPAdapter
from sigstore._internal.fulcio import ExpiredCertificate
from sigstore._internal.fulcio.client import FulcioClientError
from sigstore._internal.rekor import RekorClientError
from sigstore._internal.rekor.client_v2 import RekorV2Client
from sigstore._internal.timestamp import TimestampError
from sigstore.dsse import Statement as SigstoreStatement
from sigstore.errors import Error as SigstoreError
from sigstore.hashes import Hashed
from sigstore.models import SigningConfig
from sigstore.oidc import ExpiredIdentity
from sigstore.sign import Signer as SigstoreSigner
from sigstore.sign import SigningContext
from sigstore_models.common.v1 import HashAlgorithm

from narseal.cosign import bundle, identity
from narseal.cosign.bundle import Bundle, Envelope, MessageSignature
from narseal.cosign.identity import TokenSource
from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import PAYLOAD_TYPE, Statement, envelope_digest
from narseal.cosign.trust import Trust
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import ConfigError, NarsealError, UpstreamTrouble

#: A certificate is not used in its last seconds: a signature takes its time.
_SPARE = timedelta(seconds=60)


#: Told of the seconds that a bundle's verification took, and of those for its log entry.
Observe = Callable[[float, float], None]


class Signer(Protocol):
    """Bundles over file digests and statements."""

    @property
    def costs_nothing(self) -> bool:
        """Whether a signature needs no service."""

    def sign_digest(self, digest: bytes) -> bytes:
        """The bundle of a file with this SHA-256; UpstreamTrouble if a service fails."""

    def sign_statement(self, statement: bytes) -> bytes:
        """The bundle of an in-toto statement; UpstreamTrouble if a service fails."""


class Key(Protocol):
    """A cosign key, wherever it is. Its methods block."""

    @property
    def public(self) -> CosignPublicKey:
        """Its other half."""

    def sign_digest(self, digest: bytes) -> bytes:
        """The DER signature over a file's SHA-256; Refused or Unavailable if there is none."""

    def sign_statement(self, statement: bytes) -> bytes:
        """The DER signature over a statement in its DSSE envelope."""


class KeySigner:
    """With a cosign key; with `trust`, into its log and with its timestamp."""

    def __init__(
        self,
        key: Key,
        trust: Trust | None,
        *,
        timeout: float,
        observe: Observe = lambda *_: None,
    ) -> None:
        self._key = key
        self._observe = observe
        self._verifier = Verifier(ByKey((key.public,)), trust)
        self._log = _Log(trust, timeout) if trust else None

    @property
    def costs_nothing(self) -> bool:
        """Whether there is no log."""
        return self._log is None

    def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""
        content = MessageSignature(digest, self._key.sign_digest(digest))
        return self._finish(content, digest, subject=digest)

    def sign_statement(self, statement: bytes) -> bytes:
        """See Signer."""
        content = Envelope(PAYLOAD_TYPE, statement, self._key.sign_statement(statement))
        signed = envelope_digest(statement)
        return self._finish(content, signed, subject=_subject(statement))

    def _finish(
        self, content: MessageSignature | Envelope, signed: bytes, *, subject: bytes
    ) -> bytes:
        hint = self._key.public.hint
        entry = stamp = None
        if self._log:
            with _translated():
                entry = self._log.enter(signed, content.signature, self._key.public.der)
                stamp = self._log.timestamp(content.signature)
        done = bundle.render(content, hint=hint, log_entry=entry, timestamp=stamp)
        return _verified(done, subject, self._verifier, self._observe)


class KeylessSigner:
    """With a short-lived certificate for an OIDC identity, used again while it lives."""

    def __init__(
        self,
        token: TokenSource,
        trust: Trust,
        *,
        timeout: float,
        source: str = "its source",
        observe: Observe = lambda *_: None,
    ) -> None:
        self._observe = observe
        services = _services(trust)
        self._context = SigningContext(
            fulcio=services.get_fulcio(),
            rekor=_rekor(services, timeout),
            trusted_root=trust.root,
            tsa_clients=services.get_tsas(),
        )
        _bound(self._context._fulcio.session, timeout)  # noqa: SLF001
        self._trust = trust
        self._token = token
        self._source = source
        self._current: tuple[SigstoreSigner, Verifier, datetime] | None = None
        #: How many certificates were asked for.
        self.certificates = 0

    @property
    def costs_nothing(self) -> bool:
        """Never: each signature is a log entry."""
        return False

    def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""
        hashed = Hashed(algorithm=HashAlgorithm.SHA2_256, digest=digest)
        return self._sign(lambda signer: signer.sign_artifact(hashed).to_json(), digest)

    def sign_statement(self, statement: bytes) -> bytes:
        """See Signer."""
        parsed = SigstoreStatement(statement)
        return self._sign(lambda signer: signer.sign_dsse(parsed).to_json(), _subject(statement))

    def _sign(self, make: Callable[[SigstoreSigner], str], subject: bytes) -> bytes:
        with _translated():
            signer, verifier = self._ready()
            try:
                done = make(signer).encode()
            except (ExpiredCertificate, ExpiredIdentity):
                self._current = None
                signer, verifier = self._ready()
                done = make(signer).encode()
            return _verified(done, subject, verifier, self._observe)

    def _ready(self) -> tuple[SigstoreSigner, Verifier]:
        """A signer whose certificate lives on, and the verifier of just its identity."""
        if self._current and datetime.now(UTC) + _SPARE < self._current[2]:
            return self._current[:2]
        token = identity.parse(self._token(), source=self._source)
        self.certificates += 1
        signer = SigstoreSigner(token, self._context)
        until = signer._signing_cert().not_valid_after_utc  # noqa: SLF001
        verifier = Verifier(ByIdentity(token.identity, token.federated_issuer), self._trust)
        self._current = (signer, verifier, until)
        return signer, verifier


class _Log:
    """Rekor v2 and a timestamp authority, for signatures by key."""

    def __init__(self, trust: Trust, timeout: float) -> None:
        services = _services(trust)
        self._rekor = _rekor(services, timeout)
        self._authorities = services.get_tsas()

    def enter(self, digest: bytes, signature: bytes, key: bytes) -> dict[str, Any]:
        """The log's entry, as a bundle has it."""
        verifier = {
            "publicKey": {"rawBytes": base64.b64encode(key).decode()},
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
        }
        request = {
            "hashedRekordRequestV002": {
                "digest": base64.b64encode(digest).decode(),
                "signature": {
                    "content": base64.b64encode(signature).decode(),
                    "verifier": verifier,
                },
            }
        }
        entry = self._rekor.create_entry(request)  # type: ignore[arg-type]
        return dict(entry._inner.to_dict())  # noqa: SLF001

    def timestamp(self, signature: bytes) -> bytes | None:
        """A timestamp over a signature; None if the instance has no authority."""
        if not self._authorities:
            return None
        return self._authorities[0].request_timestamp(signature).as_bytes()


class _BoundedRekor(RekorV2Client):
    """sigstore-python's client, which waits for ever."""

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url)
        self._timeout = timeout

    @property
    def _session(self) -> requests.Session:
        session = super()._session
        _bound(session, self._timeout)
        return session


class _Bounded(HTTPAdapter):
    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout

    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,  # noqa: FBT001, FBT002 (as the supertype has it)
        timeout: Any = None,
        verify: Any = True,  # noqa: FBT002
        cert: Any = None,
        proxies: Any = None,
    ) -> Response:
        """With our timeout where the caller gave none."""
        timeout = timeout or self._timeout
        return super().send(request, stream, timeout, verify, cert, proxies)


def _bound(session: requests.Session, timeout: float) -> None:
    if not isinstance(session.adapters["http://"], _Bounded):
        session.mount("http://", _Bounded(timeout))
        session.mount("https://", _Bounded(timeout))


def _services(trust: Trust) -> SigningConfig:
    if trust.services is None:
        raise ConfigError(
            "the file is a trusted root, which is enough to verify; to sign into a log, give a"
            " client trust config, which also names the services"
        )
    return trust.services


def _rekor(services: SigningConfig, timeout: float) -> RekorV2Client:
    """The newest log; ConfigError if the instance has none of version 2."""
    urls = [service.url for service in services._tlogs if service.major_api_version == 2]  # noqa: SLF001
    if not urls:
        raise ConfigError("the Sigstore instance names no transparency log of version 2")
    return _BoundedRekor(urls[0], timeout)


def _subject(statement: bytes) -> bytes:
    """A digest that the statement covers, for verifying what was made of it."""
    return Statement.parse(statement).subjects[0].digest


def _verified(done: bytes, subject: bytes, verifier: Verifier, observe: Observe) -> bytes:
    """What the services made is held to the same measure as what a stranger brings."""
    start = perf_counter()
    try:
        verified = verifier.verify(Bundle.parse(done), subject)
    except NarsealError as error:
        raise UpstreamTrouble(f"what the Sigstore services answered is no good: {error}") from error
    observe(perf_counter() - start, verified.log_seconds)
    return done


@contextmanager
def _translated() -> Iterator[None]:
    """What may go wrong with services, as UpstreamTrouble."""
    try:
        yield
    except (
        requests.RequestException,
        FulcioClientError,
        RekorClientError,
        TimestampError,
        SigstoreError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        if isinstance(error, NarsealError):
            raise
        text = str(error) or str(error.__cause__ or "") or type(error).__name__
        raise UpstreamTrouble(f"a Sigstore service fails: {text[:500]}") from error
