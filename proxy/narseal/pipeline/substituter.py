"""The substituter: the rooms of the pipeline put together, as the server and the commands use them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from narseal.config import Config
from narseal.errors import NarsealError
from narseal.nix.cache_info import CacheInfo
from narseal.pipeline.attest.batches import Attester
from narseal.pipeline.attest.bundles import Signatures
from narseal.pipeline.nars.fetcher import Fetcher
from narseal.pipeline.nars.publisher import Publisher, served
from narseal.pipeline.nars.small import SmallNars
from narseal.pipeline.nars.stored import StoredFiles
from narseal.pipeline.paths.admission import Admission
from narseal.pipeline.paths.finder import Finder
from narseal.pipeline.paths.nars import Nars
from narseal.pipeline.paths.prefetch import NarsInAdvance, question
from narseal.pipeline.paths.realisations import Realisations
from narseal.pipeline.paths.renewal import Renewal
from narseal.pipeline.paths.side_files import SideFile, SideFiles
from narseal.pipeline.services import Services
from narseal.pipeline.services import opened as open_services
from narseal.pipeline.status import Status
from narseal.pipeline.trust.sigstore import upstream_signers
from narseal.pipeline.trust.upstream_bundles import UpstreamBundles
from narseal.pipeline.upkeep.rebuild import Rebuilding
from narseal.pipeline.upkeep.repair import Repair
from narseal.pipeline.upkeep.revocation import Revoking
from narseal.pipeline.upkeep.rotation import Rotation
from narseal.pipeline.upkeep.scrub import Scrub
from narseal.pipeline.uploads.attestations import Provenance
from narseal.pipeline.uploads.paths import Uploads
from narseal.pipeline.uploads.side_files import SideFileUploads
from narseal.runtime.shared_flights import SharedFlights
from narseal.storage import Epoch


@dataclass(frozen=True, slots=True)
class View:
    """What can be read: of everything, or of what is in storage alone."""

    admission: Admission
    finder: Finder
    nars: Nars
    nars_in_advance: NarsInAdvance
    realisations: Realisations
    side_files: SideFiles

    async def narinfo(self, hash_part: str, *, only_looks: bool = False) -> bytes:
        """The countersigned narinfo of a hash; see `Admission.path`.

        Unless its client `only_looks`, what it will ask for next is brought in advance.
        """
        if only_looks:
            return served(*await self.admission.path(hash_part)).render()
        self.admission.references.asked(hash_part)
        with question():
            path, nar = await self.admission.path(hash_part)
            self.admission.references.found(path.info)
        self.nars_in_advance.told(nar)
        return served(path, nar).render()

    async def small_nar(self, file: str, *, only_looks: bool) -> bytes | None:
        """A small NAR that is not in storage yet; see `Nars.small` and `narinfo`."""
        if not only_looks:
            self.nars_in_advance.asked(file)
        return await self.nars.small(file)

    def stop_bringing(self) -> None:
        """Bring nothing in advance any more."""
        self.admission.references.is_off = self.nars_in_advance.is_off = True

    async def side_file(self, name: str) -> SideFile:
        """A listing, a log or a debug-info pointer.

        A listing goes where its path goes, and a pointer where the NAR goes that it is of.
        """
        if self.side_files.follows_path(name):
            await self.admission.path(name.removesuffix(".ls"))
        found = await self.side_files.get(name)
        if (file := await self.side_files.nar_of(found, name)) is not None:
            await self.nars.check(file)
        return found


class Substituter:
    """What narseal serves. Made by `opened`, inside the loop that serves."""

    def __init__(self, services: Services) -> None:
        self.services = services
        config = services.config
        self.cache_info = CacheInfo(
            config.store_dir, want_mass_query=True, priority=config.priority
        )
        self.status = Status(services)
        self._publisher = Publisher(services)
        self._fetcher = Fetcher(services, self._publisher)
        self._small_nars = SmallNars(services, self._publisher)
        self._renewal = Renewal(services, self._publisher)
        self._bundles = UpstreamBundles(
            upstream_signers(config), services.index.revocations, services.threads
        )
        #: With the upstreams behind it.
        self.everything = self._view(services)
        #: What is in storage, and no more: for those who push.
        self.stored = self._view(replace(services, upstreams=()))
        admission = self.everything.admission
        self.signatures = Signatures(services)
        self.side_file_uploads = SideFileUploads(services)
        self.uploads = Uploads(
            services,
            self.everything.finder,
            admission,
            self._renewal,
            self._publisher,
            self.side_file_uploads,
        )
        self.provenance = Provenance(services, admission, self.everything.finder)
        self.repair = Repair(services, self._publisher)
        self.rotation = Rotation(services, self._renewal)
        self.revoking = Revoking(services, self._renewal, self.repair)
        self.rebuilding = Rebuilding(services, self._publisher)
        self._background: list[asyncio.Task[None]] = []

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        config: Config,
        *,
        epoch: Epoch,
        flights: SharedFlights | None = None,
        serving: bool = True,
    ) -> AsyncIterator[Self]:
        """A running substituter; on leaving, running transfers get their time to end.

        Unless it is `serving`, it does nothing of its own accord: for commands that look. An error
        of ours comes out as it is, in no group of the tasks that ended with it.
        """
        failure: NarsealError | None = None
        async with (
            open_services(config, epoch=epoch, flights=flights) as services,
            asyncio.TaskGroup() as group,
        ):
            substituter = cls(services)
            if serving:
                substituter._background = [
                    group.create_task(work, name="upkeep") for work in substituter._works()
                ]
            try:
                yield substituter
            except NarsealError as error:  # what a command was told: the group would wrap it
                failure = error
            finally:
                await substituter.retire()
        if failure:
            raise failure

    def give_way(self) -> None:
        """Other rules are in force: what is published from now on is left to those who have them to show."""
        self._publisher.retired = True

    async def retire(self) -> None:
        """Do nothing any more of its own accord; what is asked is answered on, and kept."""
        self.everything.stop_bringing()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background = []

    def _view(self, services: Services) -> View:
        finder = Finder(services)
        admission = Admission(services, finder, self._fetcher, self._renewal, self._bundles)
        nars = Nars(services, finder, self._fetcher, self._small_nars)
        return View(
            admission,
            finder,
            nars,
            NarsInAdvance(services, nars.bring),
            Realisations(services, self._renewal, admission),
            SideFiles(services),
        )

    def _works(self) -> list[Coroutine[Any, Any, None]]:
        """What a worker does of its own accord."""
        services = self.services
        works = [
            self.status.weigh(),
            self.repair.run(),
            self.rotation.run(),
        ]
        if services.config.storage.scrub_rate:
            files = StoredFiles(services, self._publisher)
            works.append(Scrub(services, self.everything.nars, files).run())
        if services.config.cosign.mode != "off":
            works.append(Attester(services, lambda: not self._publisher.retired).run())
        return works
