"""Asking the upstreams for a store path: who has it, with what evidence, and where its file is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from time import monotonic, time

from narseal.errors import Malformed, NotFound, Refused, Trouble
from narseal.nix import narinfo
from narseal.nix.hashes import Hash
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import Signature
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import StorePath
from narseal.pipeline.nars.fetcher import REFUSED_SECONDS
from narseal.pipeline.nars.transfer import Origin
from narseal.pipeline.paths.lookup import Lookup
from narseal.pipeline.services import Services
from narseal.pipeline.trust.evidence import Evidence, weigh
from narseal.pipeline.trust.policy import content_digests
from narseal.runtime.budget import Claim
from narseal.runtime.single_flight import SingleFlight
from narseal.runtime.threads import by_size
from narseal.storage import Admitted, NarRecord, PathRecord, conflict
from narseal.telemetry import metrics
from narseal.upstream import Upstream
from narseal.upstream.race import Answers, in_order

#: What is refused for reasons that another narinfo of the same file need not share.
_NOT_BYTES = ("conflict", "bad-bundle", "signer-refused", "wrong-references")
_REMEMBERED = 30.0  # seconds, of what an upstream said of a path that nobody fetched
_PREVIEWS = 4 << 20  # bytes of them, references above all


@dataclass(frozen=True, slots=True)
class Candidate:
    """An upstream's narinfo, and what speaks for it."""

    info: NarInfo
    evidence: Evidence


class Finder:
    """What the upstreams have. With no upstreams, nothing."""

    def __init__(self, services: Services) -> None:
        self._config = services.config
        self._upstreams = services.upstreams
        self._index = services.index
        self._epoch = services.epoch
        self._own_keys = services.countersigner.ring
        self._previews: dict[str, tuple[float, Admitted]] = {}
        self._previewed = 0  # bytes
        self._previewing: Lookup[Admitted] = Lookup(services, self._preview)
        self._policy = services.policy
        self._signing: Lookup[tuple[Signature, ...]] = Lookup(services, self._more_signatures)
        self._memory = services.memory_of_upstreams
        self._reading: SingleFlight[int, dict[tuple[str, str, bytes], tuple[str, float]]] = (
            SingleFlight(services.tasks, on_joined=lambda: None)
        )
        self._refusals: tuple[int, dict[tuple[str, str, bytes], tuple[str, float]]] | None = None

    def candidates(
        self, hash_part: str, answers: Answers
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[Upstream, Candidate]]]:
        """Good narinfos of a hash, as they come; what is of no use goes to `answers`."""
        return self._asked(self._upstreams, hash_part, answers)

    async def namesake(self, store_path: StorePath) -> StorePath | None:
        """Another path of the same hash part that an upstream has, with good evidence.

        Trouble if none has, and one of them could not be asked.
        """
        answers = Answers()
        async with self.candidates(store_path.hash_part, answers) as found:
            async for _, candidate in found:
                if candidate.info.store_path != store_path:
                    return candidate.info.store_path
        if isinstance(verdict := answers.verdict(str(store_path)), Trouble):
            raise verdict
        return None

    async def signatures(self, path: PathRecord) -> tuple[Signature, ...]:
        """Good signatures of an admitted path that it lacks, as far as its rule asks for them.

        The upstreams are asked once in `limits.negative_ttl`, whatever they say. NotFound if they
        were asked lately; Trouble if they do not answer in time.
        """
        return await self._signing.get(path.info.store_path.hash_part)

    def known_signers(self, store_path: StorePath) -> KeyRing:
        """All keys that are not ours and of which anybody here knows what they sign for a path."""
        known = KeyRing.of(
            self._policy.signers(store_path).keys,
            *(upstream.config.public_keys for upstream in self._upstreams),
            self._config.upload.trusted_keys,
        )
        return known.without(self._own_keys.names)

    async def _more_signatures(self, hash_part: str) -> tuple[Signature, ...]:
        found = await self._index.path(hash_part)
        if found is None or found[0].withdrawn:
            raise NotFound(f"{hash_part} was withdrawn")
        (path, nar), answers = found, Answers()
        info, message = path.info, path.message
        revoked = (await self._index.revocations.now()).keys
        known = self.known_signers(info.store_path).without(revoked)
        arrivals = self._epoch.arrivals()
        more: dict[str, Signature] = {}
        try:
            async with self.candidates(hash_part, answers) as candidates:
                async for upstream, candidate in candidates:
                    if candidate.info.fingerprint() != message:
                        error = conflict(info, candidate.info)
                        answers.note(
                            error, upstream=upstream.config.url, thing=str(info.store_path)
                        )
                        continue
                    by_known = await by_size(
                        len(message), known.verified, message, candidate.info.signatures
                    )
                    for signature in by_known:
                        more.setdefault(signature.key_name, signature)
                    all_of_them = info.with_signatures((*info.signatures, *more.values()))
                    if await self._policy.passes(all_of_them, content_digests(info, nar)):
                        break
        finally:  # also when one of them is down: 403 is an answer, and nobody has them asked at will
            lately = NotFound(
                f"the upstreams were asked for signatures of {info.store_path} lately"
            )
            self._signing.remember(hash_part, lately, arrivals)
        return tuple(more.values())

    async def preview(self, store_path: StorePath) -> tuple[Admitted, bool]:
        """A path as it is admitted, or as it would be, whatever policy says; and which of both.

        Nothing is signed or kept, but what an upstream said is remembered for a moment. NotFound,
        Refused, Malformed or Trouble if nobody has it.
        """
        if found := await self._index.path(store_path.hash_part):
            if found[0].info.store_path != store_path:
                raise NotFound(f"{store_path} is not here; {found[0].info.store_path} is")
            return found, not found[0].withdrawn
        name = str(store_path)
        known = self._previews.get(name)
        if known and known[0] > monotonic():
            return known[1], False
        seen = await self._previewing.get(name)
        self._forget(name)
        self._previews[name] = monotonic() + _REMEMBERED, seen
        self._previewed += _weight(seen)
        for old, (until, _) in list(self._previews.items()):  # the oldest first
            if until > monotonic() and self._previewed <= _PREVIEWS:
                break
            self._forget(old)
        return seen, False

    def _forget(self, name: str) -> None:
        if known := self._previews.pop(name, None):
            self._previewed -= _weight(known[1])

    async def _preview(self, name: str) -> Admitted:
        store_path = StorePath.parse(name)
        answers, arrivals = Answers(), self._epoch.arrivals()
        async with self.candidates(store_path.hash_part, answers) as candidates:
            async for upstream, candidate in candidates:
                if candidate.info.store_path == store_path:
                    nar = NarRecord.of(candidate.info, upstream.config.url)
                    return PathRecord(candidate.info, nar.file, candidate.evidence.text), nar
        verdict = answers.verdict(name)
        self._previewing.remember(name, verdict, arrivals)
        raise verdict

    async def own_origin(self, record: NarRecord) -> Origin | None:
        """Where the file of an admitted path is at its own upstream, unless it was wrong there lately."""
        own = next((u for u in self._upstreams if u.config.url == record.upstream), None)
        if not own or not record.url:
            return None
        if await self._refusal(record.upstream, record.url, record.nar_hash):
            return None
        return Origin(own, record.url)

    async def origins(self, record: NarRecord, info: NarInfo) -> AsyncIterator[Origin]:
        """Where the very file of an admitted path can be had: its own upstream, then others."""
        if own := await self.own_origin(record):
            yield own
        answers = Answers()
        hash_part = info.store_path.hash_part
        others = [u for u in self._upstreams if u.config.url != record.upstream]
        async with self._asked(others, hash_part, answers) as found:
            async for upstream, candidate in found:
                if _same_file(record, info, candidate.info):
                    yield Origin(upstream, candidate.info.url)
        if isinstance(verdict := answers.verdict(hash_part), Trouble):
            raise verdict

    async def refuse(self, upstream: Upstream, info: NarInfo, error: Refused | Malformed) -> None:
        """Do not take an upstream's file again for a time, if it was the bytes that were wrong."""
        if error.reason not in _NOT_BYTES:
            await self._index.refuse(
                upstream.config.url,
                info.url,
                info.nar_hash,
                error.reason,
                for_seconds=REFUSED_SECONDS,
            )

    @asynccontextmanager
    async def _asked(
        self, upstreams: Sequence[Upstream], hash_part: str, answers: Answers
    ) -> AsyncIterator[AsyncIterator[tuple[Upstream, Candidate]]]:
        """See `candidates`. All that is looked at within has its room in memory until the end."""
        with ExitStack() as rooms:

            async def ask(upstream: Upstream) -> Candidate:
                room = rooms.enter_context(self._memory.claim(upstream.config.url))
                return await self._ask(upstream, hash_part, room)

            thing = f"{hash_part}.narinfo"
            async with in_order(upstreams, ask, answers, thing=thing) as found:
                yield found

    async def _ask(self, upstream: Upstream, hash_part: str, room: Claim) -> Candidate:
        """One upstream's narinfo, parsed and weighed."""
        data = await upstream.get(f"{hash_part}.narinfo", limit=narinfo.MAX_BYTES, claim=room)
        if data is None:
            raise NotFound(f"{upstream.config.url} has no {hash_part}.narinfo")
        revoked = (await self._index.revocations.now()).keys
        candidate = await by_size(
            len(data), self._parse_and_weigh, upstream, hash_part, data, revoked
        )
        info = candidate.info
        reason = await self._refusal(upstream.config.url, info.url, info.nar_hash)
        if reason is not None:
            raise Refused("refused-source", f"{info.url} had wrong content lately ({reason})")
        return candidate

    def _parse_and_weigh(
        self, upstream: Upstream, hash_part: str, data: bytes, revoked: frozenset[str]
    ) -> Candidate:
        with metrics.verifying("nix"):
            info = NarInfo.parse(data, store_dir=self._config.store_dir)
            if info.store_path.hash_part != hash_part:
                raise Refused(
                    "wrong-path", f"asked for {hash_part}, the narinfo is of {info.store_path}"
                )
            return self.weigh(upstream, info, revoked)

    def weigh(self, upstream: Upstream, info: NarInfo, revoked: frozenset[str]) -> Candidate:
        """What speaks for an upstream's narinfo; Refused if nothing does. See `evidence.weigh`."""
        return Candidate(
            *weigh(
                info,
                upstream=upstream.config,
                own_keys=self._own_keys,
                max_nar_size=self._config.limits.nar_size,
                revoked=revoked,
            )
        )

    async def _refusal(self, upstream: str, url: str, nar_hash: Hash) -> str | None:
        """Why an upstream's file is not taken for a NAR now; read anew when others are."""
        now = self._epoch.refusals()
        if self._refusals is None or self._refusals[0] != now:
            self._refusals = (now, await self._reading.join(now, self._index.refusals))
        reason, until = self._refusals[1].get((upstream, url, nar_hash.digest), (None, 0.0))
        return reason if until > time() else None


def _weight(found: Admitted) -> int:
    return 1024 + len(found[0].info.references.text)


def _same_file(record: NarRecord, info: NarInfo, other: NarInfo) -> bool:
    """Whether another upstream's narinfo names the very bytes of a record."""
    if other.fingerprint() != info.fingerprint() or other.compression != record.compression:
        return False
    if record.compression == "none":
        return True
    return record.file_hash is not None and other.file_hash == record.file_hash
