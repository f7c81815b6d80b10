"""The index: which store path was admitted with which fingerprint, and which NAR file is where."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection

from sqlalchemy import (
    bindparam,
    select,
)
from sqlalchemy.dialects.sqlite import insert as insert_or

from narseal.nix.hashes import Hash
from narseal.runtime.threads import by_size
from narseal.storage import schema
from narseal.storage.admissions import NAR_BY_FILE, PATH_BY_HASH, Admissions
from narseal.storage.attestations import Attestations
from narseal.storage.claims import Claims
from narseal.storage.counts import recount
from narseal.storage.engine import Engines
from narseal.storage.epoch import Epoch
from narseal.storage.prepared import Prepared
from narseal.storage.records import (
    PATHS,
    Admitted,
    NarRecord,
    PathRecord,
    RealisationRecord,
    admitted_of,
    admitted_of_all,
    nar_of,
    realisation_of,
)
from narseal.storage.revocations import Revocations

_PAGE = 512
_PATHS_BY_FILE = Prepared(PATHS.where(schema.path.c.nar_file == bindparam("file")))
_BYTES = Prepared(select(schema.total.c.nar_bytes))


class Index:
    """Point reads at once, writes in groups, long questions in threads. Unavailable when the database fails."""

    def __init__(
        self, url: str, store_dir: str, *, attest: bool = False, epoch: Epoch | None = None
    ) -> None:
        self._epoch = Epoch.of(url) if epoch is None else epoch
        #: Of the index's file; asked before every answer out of it.
        self.presence = self._epoch.presence
        self._engines = Engines(url, self.presence)
        #: Of all paths in it.
        self.store_dir = store_dir
        self._attest = attest
        self._rows = Admissions(store_dir, attest=attest)
        #: The signatures and the life of paths, and of realisations.
        self.paths = Claims(
            schema.path,
            schema.path.c.hash_part,
            self._engines,
            self._epoch,
            self._rows.enqueue_path if attest else None,
        )
        self.realisations = Claims(
            schema.realisation, schema.realisation.c.key, self._engines, self._epoch
        )
        self.attestations = Attestations(self._engines, store_dir, attest=attest)
        self.revocations = Revocations(self._engines, self._epoch)

    async def run(self) -> None:
        """Commit until closed."""
        await self._engines.run()

    async def close(self) -> None:
        """Let `run` end once it wrote what was asked before."""
        await self._engines.close()

    async def path(self, hash_part: str) -> Admitted | None:
        """The admitted path of a hash, and the NAR file that its narinfo names."""
        row = self._engines.first(PATH_BY_HASH, hash_part=hash_part)
        if row is None:
            return None
        return await by_size(len(row.refs), admitted_of, row, self.store_dir)

    async def nar(self, file: str) -> NarRecord | None:
        """What a file name stands for; None if no admitted narinfo ever mentioned it."""
        row = self._engines.first(NAR_BY_FILE, file=file)
        return nar_of(row) if row else None

    async def nar_of_source(self, upstream: str, url: str) -> NarRecord | None:
        """The NAR that an upstream has at a URL, if a path with it was admitted."""
        query = select(schema.nar).where(schema.nar.c.upstream == upstream, schema.nar.c.url == url)
        rows = await self._engines.ask(query)
        return nar_of(rows[0]) if rows else None

    async def paths_of(self, file: str) -> list[Admitted]:
        """The admitted paths whose narinfo names a file."""
        rows = self._engines.all(_PATHS_BY_FILE, file=file)
        return await admitted_of_all(rows, self.store_dir)

    async def path_of(self, file: str) -> Admitted | None:
        """One of them."""
        row = self._engines.first(_PATHS_BY_FILE, file=file)
        return (
            None if row is None else await by_size(len(row.refs), admitted_of, row, self.store_dir)
        )

    async def refusals(self) -> dict[tuple[str, str, bytes], tuple[str, float]]:
        """Which upstream's file is not taken for which NAR hash, why, and until what Unix time.

        By upstream, URL and digest.
        """
        rows = await self._engines.ask(
            select(schema.refusal).where(schema.refusal.c.until > time.time())
        )
        return {(row.upstream, row.url, row.nar_hash): (row.reason, row.until) for row in rows}

    async def admit(self, path: PathRecord, nar: NarRecord) -> Admitted:
        """Pin a path's fingerprint and bind its file name, or find the pin that is there.

        Refused("conflict") if the path is pinned to another fingerprint. A name that already
        stands for another NAR is not used: the NAR hash's name is taken instead.
        """
        return await self._engines.write(lambda c: self._rows.admit(c, path, nar))

    async def admit_stored(self, path: PathRecord, nar: NarRecord) -> Admitted | None:
        """The same, in one transaction, for a NAR whose file is published under its own hash.

        None if the name stands for another NAR, or for one that is not stored: then `bind`,
        `publish` and `admit` sort it out.
        """
        return await self._engines.write(lambda c: self._rows.admit_stored(c, path, nar))

    async def bind(self, nar: NarRecord) -> NarRecord:
        """Bind a file name to a NAR, or find the name that this NAR has; see `admit`."""
        return await self._engines.write(lambda c: self._rows.bind(c, nar))

    async def publish(self, claimed: NarRecord, true: NarRecord) -> None:
        """Record that a NAR's bytes are in storage, under `true.file`, a bound name.

        Where that is not the claimed name, every path that names the claimed one now names
        the true one, and the claimed name goes on as another name of the same bytes.
        """
        await self._engines.write(lambda c: self._rows.publish(c, claimed, true))
        if true.file != claimed.file:
            self._epoch.advance()

    async def verified(self, file: str, at: float) -> None:
        """Record when (Unix time) a stored file was last found to be right."""
        await self._engines.write(lambda c: self._rows.verified(c, file, at))

    async def unpublish(self, file: str) -> None:
        """Record that a file is not in storage any more."""
        await self._engines.write(lambda c: self._rows.unpublish(c, file))

    async def refuse(
        self,
        upstream: str,
        url: str,
        nar_hash: Hash,
        reason: str,
        *,
        for_seconds: float,
    ) -> None:
        """Do not take an upstream's file for a NAR again for a time."""
        key = {"upstream": upstream, "url": url, "nar_hash": nar_hash.digest}
        values = {"reason": reason, "until": time.time() + for_seconds}
        row = insert_or(schema.refusal).values(**key, **values)
        row = row.on_conflict_do_update(list(key), set_=values)
        await self._engines.write(lambda c: c.execute(row))
        self._epoch.refuse()

    async def count(self) -> int:
        """How many paths are served."""
        return await self.paths.count()

    async def withdraw(self, file: str) -> list[str]:
        """Stop serving the narinfos that name a file; returns their hash parts. The pins stay."""
        hash_parts = await self._engines.write(lambda c: self._rows.withdraw(c, file))
        self._epoch.advance()
        return hash_parts

    async def realisation(self, key: str) -> RealisationRecord | None:
        """The admitted realisation at an address."""
        query = select(schema.realisation).where(schema.realisation.c.key == key)
        rows = await self._engines.ask(query)
        return await by_size(len(rows[0].body), realisation_of, rows[0]) if rows else None

    async def admit_realisation(self, record: RealisationRecord) -> RealisationRecord:
        """Pin a realisation, or find the pin that is there; Refused as by `admit`."""
        return await self._engines.write(lambda c: self._rows.admit_realisation(c, record))

    async def lacking(self, names: Collection[str]) -> AsyncIterator[list[Admitted]]:
        """Served paths that lack a signature by one of some keys of ours; page by page."""
        async for page in self._engines.pages(schema.path.c.hash_part, _PAGE):
            rows = await self._engines.survey(PATHS.where(page, *self.paths.lack(names)))
            yield await admitted_of_all(rows, self.store_dir)

    async def with_stored_nar(self) -> AsyncIterator[list[str]]:
        """Hash parts of admitted paths whose NAR is stored; page by page."""
        query = (
            select(schema.path.c.hash_part)
            .join(schema.nar, schema.path.c.nar_file == schema.nar.c.file)
            .where(schema.nar.c.stored, ~schema.path.c.withdrawn)
        )
        async for page in self._engines.pages(schema.path.c.hash_part, _PAGE):
            yield [row.hash_part for row in await self._engines.survey(query.where(page))]

    async def nars_page(self, *, after: str, limit: int) -> list[NarRecord]:
        """Stored NAR files in the order of their names, beyond one."""
        query = (
            select(schema.nar)
            .where(schema.nar.c.file > after, schema.nar.c.stored)
            .order_by(schema.nar.c.file)
            .limit(limit)
        )
        return [nar_of(row) for row in await self._engines.survey(query)]

    async def recount(self) -> None:
        """Count anew what is counted beside the rows."""
        await self._engines.write_long(recount)

    async def stored_bytes(self) -> int:
        """The sum of the sizes of the NARs in storage."""
        return int(self._engines.first(_BYTES).nar_bytes)
