"""Signing what was verified, in batches, from a queue that outlives the process.

Serving never waits for it. One worker of all does it. A batch is signed, its bundle is put into
storage, and one transaction takes its paths off the queue and records what covers what: whoever
dies in between leaves the queue as it was. Signing takes long: each path is judged again behind it,
and the transaction holds to what it was judged by.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TypeVar

from narseal.cosign import statement
from narseal.cosign.bundle import Bundle
from narseal.cosign.certificate import CertificateNames
from narseal.cosign.statement import AttestedPath, AuditHead
from narseal.errors import NarsealError, Refused, Unavailable
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.storage import Admitted, Revoked, SignedBatch, bundle_name
from narseal.storage.attestations import Waiting
from narseal.storage.records import is_void
from narseal.telemetry import metrics

T = TypeVar("T")


class _SignerRevoked(Unavailable):
    """What was signed already is of no use to whoever signs next."""


_log = logging.getLogger(__name__)
_LOOK = 1.0  # seconds between two looks at the queue
_FIRST_PAUSE = 1.0
_MANY = 16
#: Bytes of what one statement says, so that a bundle stays within what clients take.
_MAX_FACTS = 4 << 20
_MOST_HEADS = 8
_TRIES = 8


@dataclass(slots=True)
class _Begun:
    """A batch from its first try until it is recorded: each signature of it is made once."""

    batch: list[Waiting]
    heads: list[AuditHead]
    statement: bytes
    bundle: bytes | None = None
    singles: dict[str, bytes] = field(default_factory=dict)

    @property
    def paths(self) -> list[AttestedPath]:
        """What it says of which paths."""
        return [attested_path(path.admitted) for path in self.batch]


class Attester:
    """The durable queue's other end. `run` until cancelled."""

    def __init__(self, services: Services, is_current: Callable[[], bool]) -> None:
        """`is_current` says whether the rules of `services` are in force still."""
        self._is_current = is_current
        self._epoch = services.epoch
        self._heads = services.countersigner.heads
        self._policy = services.policy
        self._sigstore = services.sigstore
        self._config = services.sigstore.config
        self._attestations = services.index.attestations
        self._revocations = services.index.revocations
        self._folder = services.folder
        self._leadership = services.leadership("attest")
        self._begun: _Begun | None = None
        # a service that hangs holds up this thread, and nothing else
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attest")

    async def run(self) -> None:
        """Lead when nobody else does; then sign, batch after batch."""
        try:
            await self._leadership.lead()
            await self._sign_all()
        finally:  # what is being signed is signed again by the next
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._leadership.close()

    async def _sign_all(self) -> None:
        failures = 0
        listed = False
        while True:
            try:
                if not listed:
                    await self._attestations.enqueue_all()
                    listed = True
                full = await self._step()
                failures = 0
            except Exception as error:  # a service can make a library fail in any way
                failures += 1
                metrics.attest_failures.inc()
                if isinstance(error, Refused):
                    metrics.rejected.labels(error.reason).inc()
                # what was answered for somebody else is not asked for again at once
                hopeless = isinstance(error, Refused | _SignerRevoked)
                pause = self._pause(_MANY + 1 if hopeless else failures)
                unknown = None if isinstance(error, NarsealError) else error
                _log.warning(
                    "%s; the queue is kept, tried again in %.0f s", error, pause, exc_info=unknown
                )
                await self._sleep(pause)
                continue
            if not full:
                await asyncio.sleep(_LOOK)

    def _pause(self, failures: int) -> float:
        """Exponential, with jitter, so that a service that comes back is not overrun."""
        longest = min(self._config.retry_max, _FIRST_PAUSE * (1 << min(failures - 1, _MANY)))
        return longest * random.uniform(0.5, 1)

    async def _sleep(self, seconds: float) -> None:
        """Wait, while the metrics go on to say how much waits and for how long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await self._watch()
            await asyncio.sleep(min(left, _LOOK))

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        """Blocking work in the thread, while the metrics go on."""
        running = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        while not running.done():
            await asyncio.wait([running], timeout=_LOOK)
            await self._watch()
        return running.result()

    async def _watch(self) -> None:
        try:
            await self._look()
        except Unavailable as error:
            _log.warning("%s", error)

    async def _look(self) -> tuple[int, float]:
        """How many paths wait, and how many seconds the first does."""
        count, since = await self._attestations.queue()
        age = max(0.0, time.time() - since) if since is not None else 0.0
        metrics.attest_queue.set(count)
        metrics.attest_oldest.set(age)
        return count, age

    async def _step(self) -> bool:
        """Sign a batch if one is due; whether another may follow at once."""
        if self._begun is not None:
            if await self._still_holds(self._begun.batch):
                await self._finish(self._begun)
                return True
            self._begun = None  # what it says is not to be said any more
        if not self._is_current():
            return False  # those whose rules are in force sign
        count, age = await self._look()
        most = self._sigstore.batch_subjects - (_MOST_HEADS if self._config.anchor_audit else 0)
        if not count or (count * 2 < most and age < self._config.batch_max_age):
            return False
        batch, is_full = _batch(await self._passing(await self._attestations.oldest(most)), most)
        if not batch or not (is_full or age >= self._config.batch_max_age):
            return False
        await self._check_key()
        heads = await self._heads() if self._config.anchor_audit else []
        paths = [attested_path(path.admitted) for path in batch]
        text = await asyncio.to_thread(statement.render, paths, heads)
        self._begun = _Begun(batch, heads, text)
        return True  # it is looked at again before each try, the first one too

    async def _still_holds(self, batch: list[Waiting]) -> bool:
        """Whether all of a batch waits as it did, and policy lets it through."""
        admitted = [path.admitted for path in batch]
        if not self._is_current() or await self._attestations.still_waiting(admitted) != admitted:
            return False
        return await self._passing(batch) == batch

    async def _passing(self, waiting: list[Waiting]) -> list[Waiting]:
        """Those that nothing speaks against; the others do not wait any more.

        They wait again when somebody attests or signs them, and after each start.
        """
        revoked = (await self._revocations.now()).keys
        passing: list[Waiting] = []
        kept_back: list[Waiting] = []
        for read in waiting:
            path, nar = read.admitted
            names = {signature.key_name for signature in path.signatures}
            # what bears a revoked key's signature is held to its evidence first (`Renewal`)
            unheld = bool(revoked) and (is_void(path.evidence, revoked) or names & revoked)
            digests = content_digests(path.info, nar)
            if not unheld and await self._policy.passes(path.info, digests):
                passing.append(read)
            else:
                kept_back.append(read)
        if kept_back and self._is_current():
            await self._attestations.drop(kept_back)
        return passing

    async def _check_key(self) -> None:
        """_SignerRevoked if the configured key is: what waits, waits for another."""
        key = self._sigstore.key
        if key and key.public.hint in (await self._revocations.now()).cosign_keys:
            raise _SignerRevoked("the cosign key is revoked: configure another (cosign.key)")

    async def _check_signer(self, bundle: bytes) -> Revoked:
        """What is revoked; _SignerRevoked if whoever just signed is: what waits, waits for another."""
        revoked = await self._revocations.now()
        await self._check_key()
        certificate = Bundle.parse(bundle).certificate
        if certificate is None:
            return revoked
        named = CertificateNames.parse(certificate)
        for identity, issuer in product(named.identities, named.issuers):
            if revoked.bars(identity, issuer, named.began):
                raise _SignerRevoked(f"{identity} is revoked: let narseal sign as another identity")
        return revoked

    async def _finish(self, begun: _Begun) -> None:
        """Sign what of it is not signed yet, keep it, and take its paths off the queue."""
        try:
            await self._finish_signed(begun)
        except _SignerRevoked:  # all of it is signed anew, when somebody else does
            if begun.bundle is not None:
                await self._discard(begun.bundle)
            begun.bundle = None
            begun.singles.clear()
            raise

    async def _discard(self, bundle: bytes) -> None:
        """Take a bundle's file away, if it was written and is not recorded."""
        digest = hashlib.sha256(bundle).digest()
        await self._attestations.discard(
            digest, partial(self._folder.local.remove, bundle_name(digest))
        )

    async def _finish_signed(self, begun: _Begun) -> None:
        await self._check_key()
        bundle = await self._run(self._sign, begun)
        await self._check_signer(bundle)  # revoked while the services were slow: it is not kept
        digest = hashlib.sha256(bundle).digest()
        await self._run(self._folder.local.write, bundle_name(digest), bundle)
        covered = await self._record(begun, bundle, digest)
        self._begun = None
        if covered:
            heads = frozenset(head.digest for head in begun.heads)
            subjects = heads.union(*(attested_path(admitted).digests() for admitted in covered))
            metrics.attest_batch_subjects.observe(len(subjects))
        else:  # all of it was withdrawn meanwhile
            await self._discard(bundle)
        await self._look()

    async def _record(self, begun: _Begun, bundle: bytes, digest: bytes) -> Sequence[Admitted]:
        """Record what of a batch may be said still, while the services were slow; see `commit`."""
        for _ in range(_TRIES):
            revoked = await self._check_signer(bundle)
            heads = frozenset(head.digest for head in begun.heads)
            passing = await self._passing(begun.batch)
            paths = [path.admitted for path in passing]
            batch = SignedBatch(digest, statement.PREDICATE_TYPE, paths, heads, begun.singles)
            covered = await self._attestations.commit(batch, revoked, self._is_current)
            if covered is not None:
                return covered
            if not self._is_current():
                return ()  # those whose rules are in force sign it
            self._epoch.advance()  # somebody revoked, and may not have come to say so
        raise Unavailable("keys are being revoked; it is tried again in a moment, by itself")

    def _sign(self, begun: _Begun) -> bytes:
        """In the thread: the batch's bundle, and those of its files."""
        signer = self._sigstore.signer()
        if begun.bundle is None:
            with metrics.signing("batch"):
                begun.bundle = signer.sign_statement(begun.statement)
        for path in begun.paths if self._sigstore.per_file else ():
            if path.file not in begun.singles:
                with metrics.signing("file"):
                    begun.singles[path.file] = signer.sign_digest(path.file_hash.digest)
        return begun.bundle


def attested_path(admitted: Admitted) -> AttestedPath:
    """What a statement says of an admitted path whose content was verified."""
    path, nar = admitted
    assert nar.stored  # the queue has no others
    assert nar.file_hash
    return AttestedPath(path.info, nar.file, nar.file_hash)


def _batch(waiting: list[Waiting], most: int) -> tuple[list[Waiting], bool]:
    """As many of the first as fit into one statement; whether more would not have fitted."""
    subjects: set[bytes] = set()
    batch: list[Waiting] = []
    facts = 0
    for path in waiting:
        more = attested_path(path.admitted).digests()
        references = path.admitted[0].info.references
        size = len(references.text) + 15 * len(references) + 600
        if len(subjects | more) > most or (batch and facts + size > _MAX_FACTS):
            return batch, True
        subjects |= more
        facts += size
        batch.append(path)
    return batch, len(waiting) >= most
