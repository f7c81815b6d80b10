"""What a worker opens once and every room of the pipeline shares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from narseal.config import Config
from narseal.custody.operator import OperatorKey
from narseal.errors import ConfigError, IndexGone, StorageGone, Unavailable
from narseal.pipeline.caches import HotMap
from narseal.pipeline.trust.countersign import Countersigner
from narseal.pipeline.trust.policy import Policy
from narseal.pipeline.trust.sigstore import SigstoreSetup
from narseal.runtime.budget import Budget
from narseal.runtime.leadership import Leadership
from narseal.runtime.shared_flights import SharedFlights
from narseal.runtime.slots import FairSlots
from narseal.runtime.tasks import BackgroundTasks
from narseal.runtime.threads import ThreadPools
from narseal.storage import Epoch, Folder, Index, LocalStorage, index_file
from narseal.storage.upload_room import UploadRoom
from narseal.telemetry import metrics
from narseal.upstream import Upstream, connect


@dataclass(frozen=True, slots=True)
class Services:
    """Made by `opened`, inside the loop that serves."""

    config: Config
    #: By priority, the preferred one first.
    upstreams: tuple[Upstream, ...]
    index: Index
    folder: Folder
    epoch: Epoch
    threads: ThreadPools
    tasks: BackgroundTasks
    #: With the other workers; None if there are none.
    flights: SharedFlights | None
    countersigner: Countersigner
    policy: Policy
    sigstore: SigstoreSetup
    hot: HotMap
    #: For finding what is not in memory, of paths and realisations.
    turns: FairSlots
    #: For small files while they come and are looked at: of upstreams, and of who uploads.
    memory_of_upstreams: Budget
    memory_of_uploads: Budget
    #: On disk, for uploads that arrive or wait.
    upload_room: UploadRoom

    def leadership(self, of: str) -> Leadership:
        """The lock of what only one worker does."""
        return Leadership(index_file(self.config.storage.index).with_suffix(f".{of}.lock"))


_log = logging.getLogger(__name__)
_LOOK = 0.25  # seconds between two looks at the index's file, and at the folder's mark

#: Questions that are worked on at the same time; those that wait for an upstream are not counted.
_TURNS = 64
#: Bytes of small files, coded and decoded, that may be on their way at a time; and those of one
#: address or one upstream. What a narinfo is while it is admitted is some five times as much.
_MEMORY = 16 << 20
_MEMORY_OF_EACH = 8 << 20

#: Threads for long work on files that are here.
_LOCAL = 8


@asynccontextmanager
async def opened(
    config: Config, *, epoch: Epoch, flights: SharedFlights | None = None
) -> AsyncIterator[Services]:
    """Keys, upstreams, index and threads; on leaving, running work gets its time to end.

    ConfigError if a key cannot be used.
    """
    keys = load_keys(config)
    for key in keys:
        not_after = key.not_after.timestamp() if key.not_after else 0
        metrics.key_not_after.labels(key.public.name).set(not_after)
    lookups = config.limits.lookups
    upstreams = [connect(upstream, lookups=lookups) for upstream in config.upstream]
    # as many for each upstream: one that hangs takes none of another's
    threads = ThreadPools(transfers=config.limits.transfers * max(1, len(upstreams)) + _LOCAL)
    tasks = BackgroundTasks()
    folder = Folder(LocalStorage(config.storage.url, epoch.mark), threads)
    attest = config.cosign.mode != "off"
    index = Index(config.storage.index, config.store_dir, attest=attest, epoch=epoch)
    countersigner = Countersigner(keys, index.revocations)
    services = Services(
        config=config,
        upstreams=tuple(sorted(upstreams, key=lambda upstream: upstream.config.priority)),
        index=index,
        folder=folder,
        epoch=epoch,
        threads=threads,
        tasks=tasks,
        flights=flights,
        countersigner=countersigner,
        policy=Policy(
            config,
            own_names=countersigner.ring.names,
            attestations=index.attestations,
            revocations=index.revocations,
            folder=folder,
            threads=threads,
        ),
        sigstore=SigstoreSetup(config.cosign),
        # who may read is asked each time where reading needs a token: nothing is kept then
        hot=HotMap(max_bytes=0 if config.upload.private else config.limits.hot_map, epoch=epoch),
        turns=FairSlots(_TURNS, levelled=True),
        memory_of_upstreams=Budget(_MEMORY, each=_MEMORY_OF_EACH),
        memory_of_uploads=Budget(_MEMORY, each=_MEMORY_OF_EACH),
        upload_room=UploadRoom(
            folder.local,
            most=config.upload.quarantine_size,
            max_age=config.upload.quarantine_age,
            workers=config.workers,
        ),
    )
    async with asyncio.TaskGroup() as group:
        # without the index nothing can be served: if this ends, the worker ends
        group.create_task(index.run(), name="index")
        publishing = group.create_task(folder.run(), name="publish in groups")
        watching = [
            group.create_task(_watch(services), name="watch the index"),
            group.create_task(_watch_folder(services), name="watch the folder"),
        ]
        try:
            yield services
        finally:
            await tasks.close(wait=config.limits.shutdown_timeout)
            if flights:
                flights.close()
            for upstream in upstreams:
                await upstream.close()
            for key in keys:
                key.custodian.close()
            for task in watching:
                task.cancel()
            await folder.close()
            await asyncio.wait([publishing])  # whatever became of it
            await index.close()
            threads.close()


async def _watch(services: Services) -> None:
    """Until cancelled: without its index a worker serves nothing from memory."""
    presence, was_there = services.index.presence, True
    while True:
        await services.threads.run(presence.look)
        try:
            presence.check(is_anew=True)
        except IndexGone as error:
            services.hot.suspend()
            metrics.index_present.set(0)
            if was_there:
                _log.error("nothing is served: %s", error)
            was_there = False
        else:
            if not was_there:
                services.hot.resume()
                metrics.index_present.set(1)
                _log.warning("the index is in its place again")
            was_there = True
        await asyncio.sleep(_LOOK)


async def _watch_folder(services: Services) -> None:
    """Until cancelled: say it when the folder is not the index's, and when it is again.

    A fault while it is looked at says neither.
    """
    was_there = is_there = True
    told = ""
    while True:
        fault = ""
        try:
            await services.folder.check()
        except StorageGone as error:
            if was_there:
                metrics.storage_errors.labels("gone").inc()
                _log.error("what is stored is not served: %s", error)
            is_there = False
        except Unavailable as error:
            fault = str(error)
            if fault != told:
                _log.error("whether the storage folder is in its place is not known: %s", fault)
        else:
            if not was_there:
                _log.warning("the storage folder is in its place again")
            is_there = True
        if is_there != was_there:
            metrics.storage_present.set(is_there)
        was_there, told = is_there, fault
        await asyncio.sleep(_LOOK)


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
