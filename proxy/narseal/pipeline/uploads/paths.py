"""Taking what `nix copy --to` brings. Nothing of it is served before it was held to its hashes.

A NAR waits among the uploads, unseen, until a narinfo claims it. Then it is decoded and hashed as
it lies there, published, countersigned and pinned, in that order.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from narseal.custody.tokens import Token
from narseal.errors import (
    BadUpload,
    ContentMismatch,
    Denied,
    Forbidden,
    Malformed,
    NarsealError,
    NotFound,
    Refused,
    StorageBroken,
    Unavailable,
    UploadConflict,
)
from narseal.nix.addressing import check_content_address
from narseal.nix.compression import is_file_name
from narseal.nix.inspection import Measured, inspect_file
from narseal.nix.keyring import KeyRing
from narseal.nix.keys import Signature
from narseal.nix.narinfo import MOST_BUT_OURS, NarInfo
from narseal.pipeline.nars.inspect import inspect_stored
from narseal.pipeline.nars.publisher import Publisher
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.finder import Finder
from narseal.pipeline.paths.renewal import Renewal, path_request
from narseal.pipeline.services import Services
from narseal.pipeline.trust.policy import content_digests
from narseal.pipeline.uploads.arriving import ArrivingNar, check_size, keep_whole
from narseal.pipeline.uploads.side_files import SideFileUploads
from narseal.runtime.files import OpenFile
from narseal.runtime.portions import in_portions, in_turns
from narseal.runtime.threads import by_size
from narseal.storage import (
    Admitted,
    LocalStorage,
    NarRecord,
    PathRecord,
    still_says,
)
from narseal.storage.claims import verified_by

_log = logging.getLogger(__name__)
_TRIES = 4
#: Bytes of a NAR file that is written when all of it is there, and what part it is of all uploads at most: of a
#: larger one it is said at once that there is no room.
_AT_ONCE = 256 << 10
_PARTS = 64


class Bearer(Protocol):
    """Who uploads."""

    def look(self) -> None:
        """Look at the tokens there are, so that a `token()` right behind it need not. Blocks."""

    async def token(self) -> Token:
        """The token, as of a look that has just begun; Unauthorised if it is none any more."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A NAR that a narinfo may claim."""

    record: NarRecord
    #: Where its verified bytes lie; None if they are published already.
    incoming: OpenFile | None


class Uploads:
    """What uploaders may bring, by kind."""

    def __init__(
        self,
        services: Services,
        finder: Finder,
        admission: Admission,
        renewal: Renewal,
        publisher: Publisher,
        side_files: SideFileUploads,
    ) -> None:
        self._config = services.config
        self._upload = services.config.upload
        self._room = services.upload_room
        self._policy = services.policy
        self._folder = services.folder
        self._index = services.index
        self._threads = services.threads
        self._epoch = services.epoch
        self._finder = finder
        self._admission = admission
        self._renewal = renewal
        self._publisher = publisher
        self._side_files = side_files
        self._trusted = KeyRing.of(self._upload.trusted_keys)
        #: What bears one of these names is kept only if it verifies.
        self._known = KeyRing.of(
            self._upload.trusted_keys,
            services.countersigner.ring.keys,
            *(upstream.config.public_keys for upstream in services.upstreams),
        )

    def check_size(self, size: int | None) -> None:
        """UploadTooLarge, before a byte of the body is taken."""
        check_size(size, self._upload)

    async def put_nar(self, file: str, size: int | None, chunks: AsyncIterator[bytes]) -> None:
        """Keep a NAR file until a narinfo claims it; its name is its SHA-256.

        BadUpload if the bytes have another hash or end early; UploadTooLarge; StorageFull if all
        uploads that arrive or wait take too much room.
        """
        run = self._threads.run
        local = self._folder.local
        if size is not None and size <= min(_AT_ONCE, self._upload.quarantine_size // _PARTS):
            body = b"".join([chunk async for chunk in in_turns(chunks)])
            await run(keep_whole, local, self._room, self._upload, file, size, body)
            return
        arriving = await run(ArrivingNar, local, self._room, self._upload, size)
        try:
            await in_portions(chunks, arriving.write, run)
            await run(arriving.keep, file)
        finally:
            await run(arriving.discard)

    async def put_narinfo(self, hash_part: str, data: bytes, token: Token, bearer: Bearer) -> bool:
        """Admit a store path whose NAR was uploaded, or add signatures to one that is there.

        `token` is who began to bring it. `bearer` says who brings it when the NAR was hashed: the token may have
        been revoked since.
        Returns whether it is new. BadUpload, UploadConflict or Forbidden if not; a NAR that is not
        what the narinfo says is BadUpload too, and goes on waiting for one that agrees with it.
        """
        try:
            info = await by_size(len(data), self._parsed, hash_part, data)
            trusted = await self._authorise(info, token)
            found = await self._index.path(hash_part)
            if found and not found[0].withdrawn:
                token = await self._merge(found[0], info, bearer)
                # whoever brought it first may not have come so far
                await self._settle(info, found, token)
                return False
            await by_size(len(data), check_content_address, info)
            if not trusted:
                await self._check_hash_part(info, token)
            await self._check_references(info)
            arrived = await self._arrived(info, bearer)
            await self._admit(info, arrived, bearer)
            return True
        except Refused as error:
            kind = UploadConflict if error.reason == "conflict" else BadUpload
            raise kind(str(error)) from error
        except Malformed as error:
            raise BadUpload(str(error)) from error

    def _parsed(self, hash_part: str, data: bytes) -> NarInfo:
        info = NarInfo.parse(data, store_dir=self._config.store_dir)
        if info.store_path.hash_part != hash_part:
            raise BadUpload(f"{hash_part}.narinfo is of {info.store_path}")
        folder, _, file = info.url.partition("/")
        if folder != "nar" or not is_file_name(file, info.compression):
            raise BadUpload(
                f"{info.url[:100]!r} is not nar/<hash>.nar with the compression's suffix"
            )
        limit = min(self._config.limits.nar_size, 64 * self._upload.nar_size)
        if info.nar_size > limit:
            raise BadUpload(f"{info.store_path}: a NAR of {info.nar_size} bytes is too large")
        return info

    async def _authorise(self, info: NarInfo, token: Token) -> str | None:
        """The trusted upload key that signed it, or None if the token itself covers the path."""
        revoked = (await self._index.revocations.now()).keys
        message = info.fingerprint()
        ring = self._trusted.without(revoked)
        if signer := await by_size(len(message), ring.signer, message, info.signatures):
            return signer
        if not token.may(info.store_path.name):
            raise Forbidden(
                f"the token {token.name} does not cover {info.store_path.name}; it covers"
                f" {', '.join(token.allow) or 'nothing'}"
            )
        return None

    async def _merge(self, path: PathRecord, info: NarInfo, bearer: Bearer) -> Token:
        """Add good signatures; whatever else the narinfo says stays as it was. By whose token it was."""
        token = await bearer.token()
        await self._authorise(info, token)
        message = info.fingerprint()
        if path.info.fingerprint() != message:
            raise UploadConflict(
                f"{info.store_path} is here with NarHash {path.info.nar_hash}, and nothing is"
                f" overwritten; the upload says {info.nar_hash}"
            )
        more = set(await self._kept(info)) - set(path.info.signatures)
        if not token.may(info.store_path.name):  # a trusted key let it in: strangers' stay out
            more = {signature for signature in more if signature.key_name in self._known}
        if not more:
            return token
        verified = verified_by(self._known, message)
        try:
            await self._index.paths.sign(
                info.store_path.hash_part, more, verified=verified, only=still_says(path)
            )
        except NotFound as error:
            raise Unavailable(f"{info.store_path} is being withdrawn; bring it again") from error
        self._epoch.advance()
        return token

    async def _settle(self, info: NarInfo, admitted: Admitted, token: Token) -> None:
        """Show what is in the index by now: it is no more absent, its narinfo has a file, and so has what waited."""
        self._epoch.arrive()
        if admitted[1].stored:
            self._publisher.narinfo_behind(info.store_path.hash_part)
        await self._side_files.claim(info.url.removeprefix("nar/"), admitted, token)

    async def _kept(self, info: NarInfo) -> tuple[Signature, ...]:
        message = info.fingerprint()
        kept = partial(self._known.kept, message, info.signatures, most=MOST_BUT_OURS)
        return await by_size(len(message), kept)

    async def _check_hash_part(self, info: NarInfo, token: Token) -> None:
        """UploadConflict if an upstream has another path of the same hash part.

        A path is asked for by its hash part alone, and a token's scope is of names: it would cover
        any path of an upstream, with a name of its own behind the other's hash part. A content
        address ties the two together. Trouble if an upstream cannot say.
        """
        if token.covers_all or info.ca is not None:
            return
        if other := await self._finder.namesake(info.store_path):
            raise UploadConflict(
                f"{info.store_path} has the hash part of {other}, which an upstream has and which"
                f" the token {token.name} does not cover under this name"
            )

    async def _check_references(self, info: NarInfo) -> None:
        """A path comes after what it refers to, here or at an upstream."""
        for reference in info.references:
            if reference == info.store_path:
                continue
            missing = BadUpload(
                f"{info.store_path} refers to {reference}, which is not here: upload it first"
            )
            try:
                found = await self._admission.path(reference.hash_part)
            except Denied:  # it is here, and kept back
                if (kept_back := await self._index.path(reference.hash_part)) is None:
                    continue  # by its name: an upstream has it
                found = kept_back
            except (NotFound, Refused) as error:
                raise missing from error
            if found[0].info.store_path != reference:
                raise missing

    async def _arrived(self, info: NarInfo, bearer: Bearer) -> _Arrived:
        """The NAR that a narinfo claims, uploaded or in storage already, held to the narinfo."""
        file = info.url.removeprefix("nar/")
        if record := await self._stored(file, info):
            storage = self._folder.local
            measured = await self._threads.run_transfer(_inspect_stored, info, storage, record.file)
            self._check(info, measured)
            return _Arrived(record, None)
        # a narinfo that disagrees proves nothing against the file, which another may claim
        found = await self._threads.run_transfer(self._inspected, info, file, bearer)
        if found is None:
            if await self._stored(file, info):  # another client was faster
                return await self._arrived(info, bearer)
            raise BadUpload(f"nar/{file} is not here: upload it before its narinfo")
        incoming, measured = found
        record = NarRecord.from_file(
            info, file, file_hash=measured.file_hash, file_size=measured.file_size
        )
        return _Arrived(record, incoming)

    def _inspected(
        self, info: NarInfo, file: str, bearer: Bearer
    ) -> tuple[OpenFile, Measured] | None:
        """In a thread: a waiting file that is what the narinfo says, and a look at the tokens; None if none waits."""
        incoming = self._folder.local.open_upload(file)
        if incoming is None:
            return None
        try:
            with open(incoming.descriptor, "rb", buffering=0, closefd=False) as opened:
                measured = inspect_file(info, opened, scan=True)
            self._check(info, measured)
            bearer.look()
        except BaseException:
            incoming.drop()
            raise
        return incoming, measured

    async def _stored(self, file: str, info: NarInfo) -> NarRecord | None:
        record = await self._index.nar(file)
        same = record is not None and (record.nar_hash, record.nar_size, record.compression) == (
            info.nar_hash,
            info.nar_size,
            info.compression,
        )
        return record if record and record.stored and same else None

    def _check(self, info: NarInfo, measured: Measured) -> None:
        claimed = (info.file_hash or measured.file_hash, info.file_size or measured.file_size)
        if claimed != (measured.file_hash, measured.file_size):
            raise ContentMismatch(
                "content-mismatch",
                f"{info.url}: its FileHash is {measured.file_hash}, its size"
                f" {measured.file_size}; the narinfo says otherwise",
            )
        self._check_missing(info, measured.missing)

    def _check_missing(self, info: NarInfo, missing: frozenset[str]) -> None:
        if not missing:
            return
        sentence = f"{info.store_path}: its NAR does not contain {', '.join(sorted(missing)[:4])}"
        if self._upload.references == "refuse":
            raise BadUpload(f"{sentence}, to which the narinfo refers")
        _log.warning("%s", sentence)

    async def _admit(self, info: NarInfo, arrived: _Arrived, bearer: Bearer) -> None:
        record = replace(arrived.record, stored=True)
        try:
            token = await bearer.token()
            await self._authorise(info, token)
            if arrived.incoming:  # its name is its own hash: what is there under it is the same
                await self._publish(arrived.incoming, info, record, bearer)
        except NarsealError:
            if arrived.incoming:
                await self._threads.run(arrived.incoming.drop)
            raise
        admitted, token = await self._signed_and_pinned(info, record, bearer)
        await self._settle(info, admitted, token)
        path = admitted[0]
        _log.info(
            "uploaded %s",
            info.store_path,
            extra={"token": token.name, "evidence": path.evidence, "kept_back": not path.ours},
        )

    async def _publish(
        self, file: OpenFile, info: NarInfo, record: NarRecord, bearer: Bearer
    ) -> None:
        """Give its bytes their name. What the disk did not take is brought anew.

        Once it said so, they may be in memory alone, and the next time it says that all is well.
        """
        try:
            await self._folder.publish_in_group(file, f"nar/{record.file}", then=bearer.look)
        except StorageBroken:
            waiting = info.url.removeprefix("nar/")
            await self._threads.run(self._folder.local.discard_upload, waiting)
            raise

    async def _signed_and_pinned(
        self, info: NarInfo, nar: NarRecord, bearer: Bearer
    ) -> tuple[Admitted, Token]:
        """Sign what policy lets through, and pin; by whose token.

        The token is looked at before anything is signed, and with its keys again when all that takes its time is
        done; if they changed, it is decided anew.
        """
        for _ in range(_TRIES):
            token = await bearer.token()
            trusted = await self._authorise(info, token)
            evidence = f"upload {token.id}" + (f" signature {trusted}" if trusted else "")
            revoked = (await self._index.revocations.now()).keys
            kept = tuple(s for s in await self._kept(info) if s.key_name not in revoked)
            path = PathRecord(info.with_signatures(kept), nar.file, evidence)
            if await self._policy.passes(path.info, content_digests(path.info, nar)):
                path = await self._renewal.sign(path, path_request(path, nar))
            if await bearer.token() != token:
                continue
            try:
                return await self._pin(path, nar), token
            except Refused as error:
                if error.reason != "revoked":
                    raise
        raise Unavailable(f"{info.store_path}: keys are being revoked; bring it again")

    async def _pin(self, path: PathRecord, record: NarRecord) -> Admitted:
        """Bring both into the index."""
        if admitted := await self._index.admit_stored(path, record):
            return admitted
        bound = await self._index.bind(replace(record, stored=False))
        if bound.file != record.file:  # an upstream's lie has the name
            await self._folder.link(f"nar/{record.file}", f"nar/{bound.file}")
        record = replace(record, file=bound.file)
        await self._index.publish(bound, record)
        return await self._index.admit(replace(path, nar_file=bound.file), record)


def _inspect_stored(info: NarInfo, storage: LocalStorage, file: str) -> Measured:
    return inspect_stored(info, storage, file, scan=True)
