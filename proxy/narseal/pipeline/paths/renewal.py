"""The life of what is admitted, paths and realisations alike: signed anew, held to evidence, withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from narseal.custody.requests import PathRequest, RealisationRequest, Request
from narseal.errors import Denied, Malformed, NarsealError, NotFound, Refused, Unavailable
from narseal.nix.addressing import check_content_address
from narseal.nix.keyring import KeyRing
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.runtime.threads import by_size
from narseal.storage import Admitted, NarRecord, PathRecord, RealisationRecord, Revoked
from narseal.storage.claims import Brought, Claims, Signing
from narseal.storage.records import says

R = TypeVar("R", PathRecord, RealisationRecord)

_TRIES = 4
_GROUP = 32  # paths that are signed in one transaction

#: Only who admits looks for other evidence: what a path has to have depends on the upstream that has it.
_WITHDRAWN = (
    "was withdrawn: it was admitted on the word of what is revoked; it is served again when it is asked"
    " for and an upstream has it on other evidence"
)


class Renewal:
    """Signs admitted records with the keys that are active now, as long as something speaks for them."""

    def __init__(self, services: Services, publisher: Publisher) -> None:
        self._index = services.index
        self._folder = services.folder
        self._policy = services.policy
        self._countersigner = services.countersigner
        self._epoch = services.epoch
        self._publisher = publisher
        self._pinned = KeyRing.of(
            *(upstream.config.public_keys for upstream in services.upstreams),
            services.config.upload.trusted_keys,
        )

    async def path(self, found: Admitted) -> Admitted:
        """An admitted path that policy lets through, signed by every key that is active now.

        Denied by policy; Refused if it carries a revoked key's signature and no evidence holds
        any more: it is withdrawn then, and may be admitted anew.
        """
        path, nar = found
        await self._policy.check(path.info, content_digests(path.info, nar))

        async def verify() -> None:
            check_content_address(path.info)
            await self._publisher.verify_stored(path.info, nar)

        renewed = await self._renewed(self._index.paths, path, path_request(path, nar), verify)
        if renewed is not path:
            await self._publisher.narinfo(path.info.store_path.hash_part)
        return renewed, nar

    async def realisation(self, record: RealisationRecord) -> RealisationRecord:
        """The same for a realisation; see `path`."""

        async def verify() -> None:
            if not record.evidence.startswith("upload "):
                raise Refused("unsigned", f"{record.key}: a realisation has no content to measure")

        request = RealisationRequest(record.key, record.entry)
        return await self._renewed(self._index.realisations, record, request, verify)

    async def renew_path(self, hash_part: str) -> None:
        """Sign an admitted path anew, as if it had been asked for; see `path`.

        NotFound if it is not admitted, or was withdrawn.
        """
        found = await self._index.path(hash_part)
        if not found or found[0].withdrawn:
            raise NotFound(f"{hash_part} {_WITHDRAWN}")
        await self.path(found)

    async def renew_paths(self, found: Sequence[Admitted]) -> list[NarsealError | None]:
        """The same of paths in force, as they were read, together; why each is not signed, if it is not.

        What they were judged by is looked at again in the transaction that signs them; if it is
        another by then, they are judged anew. Unavailable if a key, the index or the folder cannot
        be had: what was signed until then is signed.
        """
        outcomes: dict[str, NarsealError | None] = {}
        try:
            for at in range(0, len(found), _GROUP):
                outcomes |= await self._renewed_all(found[at : at + _GROUP])
        finally:  # the folder says what the index does, however far that came
            done = [key for key, failure in outcomes.items() if failure is None]
            await self._publisher.narinfos(done, in_background=True)
        for failure in outcomes.values():
            if isinstance(failure, Unavailable):
                raise failure
        return list(outcomes.values())

    async def show(self, hash_parts: Collection[str]) -> None:
        """Make the folder say of paths what the index says of them."""
        await self._publisher.narinfos(hash_parts, looks=True, in_background=True)

    async def _renewed_all(self, found: Sequence[Admitted]) -> dict[str, NarsealError | None]:
        """Sign so many that the loop has its turn in between; see `renew_paths`."""
        for _ in range(_TRIES):
            revoked = await self._index.revocations.now()
            outcomes, signings = await self._judged(found, revoked)
            signed = await self._index.paths.sign_all(
                signings, revoked, lambda: not self._publisher.retired
            )
            if signed is not None:
                break
            if self._publisher.retired:
                raise Unavailable("other rules are in force; the workers that have them go on")
            self._epoch.advance()  # somebody revoked, and may not have come to say so
        else:
            raise Unavailable("keys are being revoked; it is tried again in a moment, by itself")
        gone = (s.brought.key for s, done in zip(signings, signed, strict=True) if done is None)
        for key in gone:
            outcomes[key] = NotFound(
                f"{key} is not in the index any more, or is another one by now"
            )
        return outcomes

    async def _judged(
        self, found: Sequence[Admitted], revoked: Revoked
    ) -> tuple[dict[str, NarsealError | None], list[Signing]]:
        """What became of each path so far, by its hash part; and what is to be added to which."""
        outcomes: dict[str, NarsealError | None] = {}
        asked: list[Admitted] = []
        for path, nar in found:
            key = path.info.store_path.hash_part
            outcomes[key] = None
            try:
                if {signature.key_name for signature in path.signatures} & revoked.keys:
                    await self.renew_path(key)  # it is held to its evidence first
                    continue
                await self._policy.check(path.info, content_digests(path.info, nar))
            except NarsealError as error:
                outcomes[key] = error
                continue
            asked.append((path, nar))
        signings: list[Signing] = []
        done = await asyncio.gather(
            *(
                self._countersigner.countersign(path_request(path, nar), path.signatures)
                for path, nar in asked
            ),
            return_exceptions=True,
        )
        for (path, _), outcome in zip(asked, done, strict=True):
            key = path.info.store_path.hash_part
            if isinstance(outcome, NarsealError):
                outcomes[key] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                brought = Brought(key, outcome.signatures, outcome.ours, outcome.dropped)
                signings.append(Signing(path, brought))
        return outcomes, signings

    async def renew_realisation(self, key: str) -> None:
        """The same for a realisation; Denied, too, if policy keeps the path back that it is of."""
        record = await self._index.realisation(key)
        if not record or record.withdrawn:
            raise NotFound(f"{key} {_WITHDRAWN}")
        await self.check_out_path(record)
        await self.realisation(record)

    async def strip_path(self, hash_part: str) -> None:
        """Take revoked keys' signatures off a path that is not served."""
        await self._index.paths.sign(hash_part, ())
        await self._publisher.narinfo(hash_part)

    async def strip_realisation(self, key: str) -> None:
        """The same for a realisation."""
        await self._index.realisations.sign(key, ())

    async def check_out_path(self, record: RealisationRecord) -> None:
        """Denied if policy keeps the path back that a realisation is of."""
        if not self._policy.active:
            return
        found = await self._index.path(record.entry.out_path.hash_part)
        if found is None:
            raise Denied(f"{record.key}: {record.entry.out_path} was not admitted")
        await self._policy.check(found[0].info, content_digests(found[0].info, found[1]))

    async def sign(self, record: R, request: Request) -> R:
        """Add the signatures of our active keys that are missing, before it is admitted."""
        done = await self._countersigner.countersign(request, record.signatures)
        return record.signed(done.signatures, done.ours)

    async def _renewed(
        self, claims: Claims, record: R, request: Request, verify: Callable[[], Awaitable[None]]
    ) -> R:
        revoked = (await self._index.revocations.now()).keys
        names = {signature.key_name for signature in record.signatures}
        key = request_key(request)
        if names & revoked:
            # before the row loses the signature by which the narinfo in the folder is found
            await self._folder.check()
            await self._hold(claims, record, key, verify, revoked)
        active = {operator.public.name for operator in await self._countersigner.active()}
        if active and active <= record.ours and not names & revoked:
            return record
        done = await self._countersigner.countersign(request, record.signatures)
        try:
            signed = await claims.sign(
                key, done.signatures, ours=done.ours, drop=done.dropped, only=says(record)
            )
        except NotFound as error:  # its pin was void, and it is another by now
            raise Unavailable(str(error)) from error
        return record.signed(*signed)

    async def _hold(
        self,
        claims: Claims,
        record: R,
        key: str,
        verify: Callable[[], Awaitable[None]],
        revoked: frozenset[str],
    ) -> None:
        """Hold a record to a signature by a key that is not revoked, or to what `verify` measures."""
        pinned = self._pinned.without(revoked)
        message = record.message
        if await by_size(len(message), pinned.signer, message, record.signatures):
            return
        try:
            await verify()
        except (Refused, Malformed) as error:
            await claims.withdraw(key)
            if isinstance(record, PathRecord):
                await self._publisher.narinfo(key)
            raise Refused(
                "unsigned", f"{key}: a key was revoked and nothing else speaks for it"
            ) from error


def path_request(path: PathRecord, nar: NarRecord) -> PathRequest:
    """What a signer is asked: the narinfo with its evidence, in the compression that is stored.

    An uploaded path has no URL of an upstream's, and a signer reads whole narinfos: so it is ours.
    """
    info = path.info
    if nar.stored:
        info = replace(info, url=f"nar/{nar.file}", compression=nar.compression)
        return PathRequest(info, nar.file)
    return PathRequest(info if info.url else replace(info, url=f"nar/{nar.file}"), None)


def request_key(request: Request) -> str:
    """Under which key the index has what is to be signed."""
    if isinstance(request, RealisationRequest):
        return request.name
    return request.info.store_path.hash_part
