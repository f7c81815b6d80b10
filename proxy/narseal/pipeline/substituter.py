"""The substituter: all rooms of the pipeline put together, as the server uses it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

from narseal import __version__
from narseal.config import Config
from narseal.custody.operator import OperatorKey
from narseal.errors import ConfigError, Denied, NotFound, Unavailable
from narseal.nix.cache_info import CacheInfo
from narseal.nix.keys import PublicKey
from narseal.pipeline.attest.batches import Attester
from narseal.pipeline.attest.bundles import Signatures
from narseal.pipeline.caches import HotMap
from narseal.pipeline.nars.fetcher import Fetcher, served
from narseal.pipeline.nars.transfer import Reader
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.realisations import Realisations
from narseal.pipeline.paths.side_files import SideFile, SideFiles
from narseal.pipeline.trust.countersign import Countersigner
from narseal.pipeline.trust.policy import Policy, content_digests
from narseal.pipeline.trust.sigstore import ExpectedSigners, SigstoreSetup, upstream_signers
from narseal.pipeline.trust.upstream_bundles import Sidecars
from narseal.pipeline.upkeep.repair import mend
from narseal.pipeline.upkeep.revocation import Revoking
from narseal.pipeline.upkeep.rotation import Rotation
from narseal.pipeline.uploads.attestations import Provenance
from narseal.pipeline.uploads.paths import Uploads
from narseal.runtime.tasks import BackgroundTasks
from narseal.runtime.threads import ThreadPools
from narseal.storage import Epoch, Index, Leadership, LocalStorage, NarRecord, index_file
from narseal.telemetry import metrics
from narseal.upstream import Upstream, connect

_KNOWN = 20_000
_WEIGH_EVERY = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredNar:
    """A complete, verified file, open for reading. To be closed."""

    descriptor: int
    size: int

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


class Substituter:
    """What narseal serves. Made by `opened`, inside the loop that serves."""

    def __init__(
        self,
        config: Config,
        *,
        keys: list[OperatorKey],
        upstreams: list[Upstream],
        epoch: Epoch,
        cosigning: SigstoreSetup,
        signers: ExpectedSigners,
    ) -> None:
        self.config = config
        self._cosigning = cosigning
        self._keys = keys
        self._epoch = epoch
        self._background: list[asyncio.Task[None]] = []
        self.tasks = BackgroundTasks()
        self.threads = ThreadPools(transfers=config.limits.transfers)
        self.upstreams = upstreams
        self.hot = HotMap(
            # who may read is asked each time: nothing is answered from memory then
            max_bytes=0 if config.upload.private else config.limits.hot_map,
            epoch=epoch,
        )
        self.cache_info = CacheInfo(
            config.store_dir, want_mass_query=True, priority=config.priority
        )
        #: Stored files, so that one that is asked for again costs no question to the index.
        self._known: dict[str, NarRecord] = {}
        self._storage = LocalStorage(config.storage.url)
        self._index = Index(
            config.storage.index,
            config.store_dir,
            attest=config.cosign.mode != "off",
            epoch=epoch,
        )
        self.countersigner = Countersigner(keys, self._index.revocations)
        self.policy = Policy(
            config,
            own_keys=self.countersigner.public_keys,
            attestations=self._index.attestations,
            revocations=self._index.revocations,
            storage=self._storage,
            threads=self.threads,
        )
        self._fetcher = Fetcher(
            config,
            storage=self._storage,
            index=self._index,
            epoch=epoch,
            hot=self.hot,
            tasks=self.tasks,
            threads=self.threads,
            policy=self.policy,
        )
        self._admission = Admission(
            config,
            upstreams=upstreams,
            index=self._index,
            fetcher=self._fetcher,
            countersigner=self.countersigner,
            tasks=self.tasks,
            epoch=epoch,
            sidecars=Sidecars(signers, self.threads),
            policy=self.policy,
        )
        self.signatures = Signatures(
            cosigning,
            self.countersigner,
            index=self._index,
            storage=self._storage,
            threads=self.threads,
        )
        self.realisations = Realisations(
            config.limits,
            upstreams=upstreams,
            index=self._index,
            countersigner=self.countersigner,
            tasks=self.tasks,
            epoch=epoch,
            admission=self._admission,
            policy=self.policy,
        )
        self.uploads = Uploads(
            config,
            storage=self._storage,
            index=self._index,
            admission=self._admission,
            fetcher=self._fetcher,
            countersigner=self.countersigner,
            threads=self.threads,
            epoch=epoch,
            policy=self.policy,
        )
        self.provenance = Provenance(
            config,
            policy=self.policy,
            admission=self._admission,
            attestations=self._index.attestations,
            storage=self._storage,
            threads=self.threads,
            tasks=self.tasks,
            epoch=epoch,
        )
        self._side_files = SideFiles(
            config.limits,
            upstreams=upstreams,
            storage=self._storage,
            index=self._index,
            tasks=self.tasks,
            threads=self.threads,
        )

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, config: Config, *, epoch: Epoch, serving: bool = True
    ) -> AsyncIterator[Self]:
        """A running substituter; on leaving, running transfers get their time to end.

        Unless it is `serving`, it does nothing of its own accord: for commands that look.
        """
        keys = load_keys(config)
        upstreams = [connect(upstream) for upstream in config.upstream]
        substituter = cls(
            config,
            keys=keys,
            upstreams=upstreams,
            epoch=epoch,
            cosigning=SigstoreSetup(config.cosign),
            signers=upstream_signers(config),
        )
        for key in keys:
            not_after = key.not_after.timestamp() if key.not_after else 0
            metrics.key_not_after.labels(key.public.name).set(not_after)
        async with asyncio.TaskGroup() as group:
            # without the index nothing can be served: if this ends, the worker ends
            group.create_task(substituter._index.run(), name="index")
            if serving:
                works = [
                    substituter._weigh_storage(),
                    substituter._mend(),
                    substituter._attest(),
                    substituter._rotate(),
                ]
                substituter._background = [group.create_task(work) for work in works]
            try:
                yield substituter
            finally:
                await substituter.retire()
                await substituter.tasks.close(wait=config.limits.shutdown_timeout)
                for upstream in upstreams:
                    await upstream.close()
                for key in keys:
                    key.custodian.close()
                await substituter._index.close()
                substituter.threads.close()

    async def retire(self) -> None:
        """Do nothing any more of its own accord; what is asked is answered on."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background = []

    async def _attest(self) -> None:
        if self.config.cosign.mode == "off":
            return
        attester = Attester(
            self._cosigning,
            index=self._index,
            storage=self._storage,
            leadership=self._leadership("attest"),
            policy=self.policy,
            heads=self.countersigner.heads,
        )
        try:
            await attester.run()
        finally:
            attester.close()

    async def _rotate(self) -> None:
        rotation = Rotation(
            index=self._index,
            admission=self._admission,
            realisations=self.realisations,
            countersigner=self.countersigner,
            leadership=self._leadership("rotation"),
            rate=self.config.signing.resign_rate,
        )
        try:
            await rotation.run()
        finally:
            rotation.close()

    def _leadership(self, of: str) -> Leadership:
        return Leadership(index_file(self.config.storage.index).with_suffix(f".{of}.lock"))

    async def _mend(self) -> None:
        await mend(self._index, self._storage, self._fetcher, self.policy, self.threads)

    async def _weigh_storage(self) -> None:
        """Keep the metric of storage's size."""
        while True:
            try:
                metrics.storage_bytes.set(await self._index.stored_bytes())
            except Unavailable as error:
                _log.warning("%s", error)
            await asyncio.sleep(_WEIGH_EVERY)

    async def narinfo(self, hash_part: str, *, stored_only: bool = False) -> bytes:
        """The countersigned narinfo of a hash; see `Admission.path`."""
        admitted = await self._admission.path(hash_part, stored_only=stored_only)
        return served(*admitted).render()

    async def nar(self, file: str, *, stored_only: bool = False) -> StoredNar | Reader:
        """The file of an admitted narinfo: from storage, or while it is being fetched.

        NotFound for a name that no admitted narinfo mentions; Denied if policy keeps back every
        path that it is of.
        """
        await self.check_file(file)
        while True:
            if not stored_only and (reader := self._fetcher.join(file)) is not None:
                return reader
            if (known := self._known.pop(file, None)) and (stored := await self._open(known)):
                self._known[file] = known
                return stored
            record = await self._index.nar(file)
            if record is None:
                raise NotFound(f"no narinfo that was served names nar/{file}")
            if (stored := await self._stored(record)) is not None:
                return stored
            if stored_only:
                raise NotFound(f"nar/{file} is not in storage")
            if (begun := await self._fetch(record)) is not None:
                return begun

    async def check_file(self, file: str) -> None:
        """Denied if policy keeps back every path that a NAR file is of."""
        if not self.policy.active or (record := await self._index.nar(file)) is None:
            return
        denied: Denied | None = None
        for path, nar in await self._index.paths_of(record.published_as or file):
            try:
                await self.policy.check(path.info, content_digests(path.info, nar))
            except Denied as error:
                denied = error
            else:
                return
        if denied:
            raise denied

    async def side_file(self, name: str, *, stored_only: bool = False) -> SideFile:
        """A listing, a log or a debug-info pointer; a listing goes where its path goes."""
        if self.policy.active and name.endswith(".ls"):
            await self._admission.path(name.removesuffix(".ls"), stored_only=stored_only)
        return await self._side_files.get(name, stored_only=stored_only)

    async def put_side_file(self, name: str, data: bytes) -> None:
        """Keep an uploaded listing, log or pointer; see SideFiles."""
        await self._side_files.put(name, data)

    async def _fetch(self, record: NarRecord) -> Reader | None:
        paths = await self._index.paths_of(record.published_as or record.file)
        if not paths:
            raise NotFound(f"no narinfo names nar/{record.file} any more")
        info = paths[0][0].info
        return await self._fetcher.start(
            record, info, lambda: self._admission.origins(record, info)
        )

    async def public_keys(self) -> list[PublicKey]:
        """The operator's, less revoked ones."""
        revoked = (await self._index.revocations.now()).keys
        return [k for k in self.countersigner.public_keys.values() if k.name not in revoked]

    def revoking(self) -> Revoking:
        """The work of `narseal revoke`."""
        return Revoking(
            index=self._index,
            admission=self._admission,
            storage=self._storage,
            threads=self.threads,
            epoch=self._epoch,
        )

    async def status(self) -> dict[str, Any]:
        """How it stands with keys, signatures and queues, as JSON."""
        revoked = await self._index.revocations.now()
        active = {key.public.name for key in await self.countersigner.active()}
        waiting, since = await self._index.attestations.queue()
        return {
            "version": __version__,
            "paths": await self._index.count(),
            "storedBytes": await self._index.stored_bytes(),
            "keys": [
                {
                    "name": key.public.name,
                    "active": key.public.name in active,
                    "notBefore": key.not_before.isoformat() if key.not_before else None,
                    "notAfter": key.not_after.isoformat() if key.not_after else None,
                }
                for key in self._keys
            ],
            "lackSignatures": await self._index.count_lacking(active) if active else 0,
            "cosign": {"mode": self.config.cosign.mode, "waiting": waiting, "since": since},
            "revoked": [asdict(revocation) for revocation in revoked.all],
        }

    async def ready(self) -> None:
        """Raises Unavailable if the index cannot be read."""
        await self._index.stored_bytes()

    async def _open(self, record: NarRecord) -> StoredNar | None:
        """The file of a record, None unless it is there with its size."""
        path = self._storage.path(f"nar/{record.file}")
        stored = await self.threads.run(_open, str(path))
        if stored is None or stored.size == record.file_size:
            return stored
        stored.close()
        return None

    async def _stored(self, record: NarRecord) -> StoredNar | None:
        """The published file, if it is there and whole; a lost one is struck off the index."""
        if record.published_as:
            target = await self._index.nar(record.published_as)
            return await self._stored(target) if target else None
        if not record.stored:
            return None
        if (stored := await self._open(record)) is not None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[record.file] = record
            return stored
        await self._index.unpublish(record.file)
        if not record.url:  # recompressed here: its path has to be admitted anew
            await self._index.withdraw(record.file)
            self._epoch.advance()
        return None


def load_keys(config: Config) -> list[OperatorKey]:
    """The operator's keys; ConfigError if there is none, one cannot be used, or names clash."""
    if not config.signing.key:
        raise ConfigError(
            "there is no [[signing.key]]: make one with `narseal key generate NAME` and name its"
            ' file there: url = "file:/path"'
        )
    keys = [OperatorKey.open(key) for key in config.signing.key]
    own = {key.public.name: key.public for key in keys}
    if len(own) < len(keys):
        raise ConfigError("two [[signing.key]] have the same name")
    for upstream in config.upstream:
        for public in upstream.public_keys:
            if own.get(public.name, public) != public:
                raise ConfigError(
                    f"{upstream.url}: its key {public.name} is another than the [[signing.key]]"
                    " of that name; give yours a name of its own"
                )
    return keys


def _open(path: str) -> StoredNar | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    return StoredNar(descriptor, os.fstat(descriptor).st_size)
