"""Making bundles: with a key, a key and a log, or keyless.

Each signer blocks, for up to a few times its timeout where there is a network: call it in a
thread. What it returns was verified by the very verifier that others use.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding
from sigstore._internal.rekor.client_v2 import RekorV2Client
from sigstore.oidc import ExpiredIdentity
from sigstore.sign import Signer as SigstoreSigner
from sigstore.sign import SigningContext

from narseal.cosign import bundle, identity, issuers
from narseal.cosign.bundle import Bundle, Envelope, MessageSignature, SignedBy
from narseal.cosign.certificate import CertificateNames
from narseal.cosign.identity import TokenSource
from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.services import Log, bound, services_of, translated
from narseal.cosign.statement import PAYLOAD_TYPE, Statement, envelope_digest
from narseal.cosign.trust import Trust
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import NarsealError, Refused, UpstreamTrouble

_log = logging.getLogger(__name__)
#: A certificate is not used in its last seconds: a signature takes its time.
_SPARE = timedelta(seconds=60)
#: Signatures that are kept because the log did not answer, and for how long: what cannot be found
#: in the log by then is signed anew.
_KEPT = 64
_KEPT_FOR = timedelta(hours=1)
_PREHASHED = ec.ECDSA(Prehashed(hashes.SHA256()))


#: Told of the seconds that a bundle's verification took, and of those for its log entry.
Observe = Callable[[float, float], None]


class Signer(Protocol):
    """Bundles over file digests and statements."""

    @property
    def costs_nothing(self) -> bool:
        """Whether a signature needs no service."""

    @property
    def who(self) -> str:
        """The key's hint, or the certificate's identity and issuer; "" before there is one."""

    def sign_digest(self, digest: bytes) -> bytes:
        """The bundle of a file with this SHA-256.

        UpstreamTrouble if a service fails: asked for the same again, what was signed is entered
        into the log once. Refused if a service's answer is for somebody else.
        """

    def sign_statement(self, statement: bytes) -> bytes:
        """The bundle of an in-toto statement; errors as of `sign_digest`."""


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
        self._by = SignedBy(key=key.public)
        self._verifier = Verifier(ByKey((key.public,)), trust)
        self._finisher = _Finisher(Log(trust, timeout) if trust else None, observe)

    @property
    def costs_nothing(self) -> bool:
        """Whether there is no log."""
        return not self._finisher.has_log

    @property
    def who(self) -> str:
        """See Signer."""
        return self._key.public.hint

    def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""

        def make() -> _Begun:
            content = MessageSignature(digest, self._key.sign_digest(digest))
            return _Begun(content, self._by, self._verifier)

        return self._finisher.finish(digest, digest, make)

    def sign_statement(self, statement: bytes) -> bytes:
        """See Signer."""

        def make() -> _Begun:
            content = Envelope(PAYLOAD_TYPE, statement, self._key.sign_statement(statement))
            return _Begun(content, self._by, self._verifier)

        return self._finisher.finish(envelope_digest(statement), _subject(statement), make)


class KeylessSigner:
    """With a short-lived certificate for an OIDC identity, used again while it lives."""

    def __init__(
        self,
        token: TokenSource,
        trust: Trust,
        *,
        timeout: float,
        source: str = "its source",
        expected: str | None = None,
        observe: Observe = lambda *_: None,
    ) -> None:
        """`expected` is the identity that certificates must name; None: the token's."""
        log = Log(trust, timeout)
        self._context = SigningContext(
            fulcio=services_of(trust).get_fulcio(),
            rekor=RekorV2Client(""),  # never asked: this context only gets certificates
            trusted_root=trust.root,
        )
        bound(self._context._fulcio.session, timeout)  # noqa: SLF001
        self._finisher = _Finisher(log, observe)
        self._trust = trust
        self._token = token
        self._source = source
        self._expected = expected
        self._current: _Certificate | None = None
        #: How many certificates were asked for.
        self.certificates = 0

    @property
    def costs_nothing(self) -> bool:
        """Never: each signature is a log entry."""
        return False

    @property
    def who(self) -> str:
        """See Signer."""
        return self._current.who if self._current else ""

    def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""

        def make() -> _Begun:
            now = self._ready()
            return _Begun(MessageSignature(digest, now.sign(digest)), now.by, now.verifier)

        return self._finisher.finish(digest, digest, make)

    def sign_statement(self, statement: bytes) -> bytes:
        """See Signer."""
        signed = envelope_digest(statement)

        def make() -> _Begun:
            now = self._ready()
            content = Envelope(PAYLOAD_TYPE, statement, now.sign(signed))
            return _Begun(content, now.by, now.verifier)

        return self._finisher.finish(signed, _subject(statement), make)

    def _ready(self) -> _Certificate:
        """A certificate that lives on."""
        if self._current is None or datetime.now(UTC) + _SPARE > self._current.until:
            with translated():
                try:
                    self._current = self._ask()
                except ExpiredIdentity as error:
                    raise UpstreamTrouble(
                        f"the identity token from {self._source} has ended"
                    ) from error
        return self._current

    def _ask(self) -> _Certificate:
        """A certificate from Fulcio, held to the token before anything is signed with it."""
        token = identity.parse(self._token(), source=self._source)
        self.certificates += 1
        signer = SigstoreSigner(token, self._context)
        certificate = signer._signing_cert()  # noqa: SLF001
        names = CertificateNames.of(certificate)
        claims = token._unverified_claims  # noqa: SLF001
        name, issuer = issuers.check(names, claims, expected=self._expected)
        _log.info("signing keyless as %s of %s", name, issuer)
        return _Certificate(
            signer._private_key,  # noqa: SLF001
            SignedBy(certificate=certificate.public_bytes(Encoding.DER)),
            Verifier(ByIdentity(name, issuer), self._trust),
            certificate.not_valid_after_utc,
            f"{name} of {issuer}",
        )


@dataclass(frozen=True, slots=True)
class _Certificate:
    """A short-lived key with its certificate."""

    key: ec.EllipticCurvePrivateKey
    by: SignedBy
    #: Of just its identity.
    verifier: Verifier
    until: datetime
    who: str

    def sign(self, digest: bytes) -> bytes:
        """The DER signature over a SHA-256 digest."""
        return self.key.sign(digest, _PREHASHED)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A signature that is not in the log yet, or whose place in the log is not known."""

    content: MessageSignature | Envelope
    by: SignedBy
    verifier: Verifier
    stamps: tuple[bytes, ...] = ()
    since: datetime = field(default_factory=lambda: datetime.now(UTC))


class _Finisher:
    """From signatures to bundles.

    All that can be wrong without the log is found before the log has the signature. From then on
    the same signature is finished, however often that takes: another would be another entry.
    """

    def __init__(self, log: Log | None, observe: Observe) -> None:
        self._log = log
        self._observe = observe
        self._begun: OrderedDict[bytes, _Begun] = OrderedDict()

    @property
    def has_log(self) -> bool:
        return self._log is not None

    def finish(self, signed: bytes, subject: bytes, make: Callable[[], _Begun]) -> bytes:
        """The verified bundle of the signature that `make` makes over the digest `signed`."""
        if self._log is None:
            return self._verified(make(), None, subject)
        begun = self._begun.get(signed)
        if begun is None or datetime.now(UTC) - begun.since > _KEPT_FOR:
            begun = self._stamped(make(), subject)
            self._begun[signed] = begun
            while len(self._begun) > _KEPT:
                self._begun.popitem(last=False)
        try:
            entry = self._log.enter(signed, begun.content.signature, begun.by.log_verifier())
        except Refused:
            del self._begun[signed]
            raise
        done = self._verified(begun, entry, subject)
        del self._begun[signed]
        return done

    def _stamped(self, begun: _Begun, subject: bytes) -> _Begun:
        """With its timestamps, and found good as far as it goes."""
        assert self._log is not None  # the caller saw to it
        stamps = self._log.timestamps(begun.content.signature)
        begun = replace(begun, stamps=stamps)
        unlogged = bundle.render(begun.content, begun.by, timestamps=stamps)
        try:
            begun.verifier.verify_unlogged(Bundle.parse(unlogged))
        except NarsealError as error:
            raise _no_good(error) from error
        return begun

    def _verified(self, begun: _Begun, entry: dict[str, object] | None, subject: bytes) -> bytes:
        """What the services made is held to the same measure as what a stranger brings."""
        done = bundle.render(begun.content, begun.by, log_entry=entry, timestamps=begun.stamps)
        start = perf_counter()
        try:
            verified = begun.verifier.verify(Bundle.parse(done), subject)
        except NarsealError as error:
            raise _no_good(error) from error
        self._observe(perf_counter() - start, verified.log_seconds)
        return done


def _no_good(error: NarsealError) -> UpstreamTrouble:
    return UpstreamTrouble(f"what the Sigstore services answered is no good: {error}")


def _subject(statement: bytes) -> bytes:
    """A digest that the statement covers, for verifying what was made of it."""
    return Statement.parse(statement).subjects[0].digest
