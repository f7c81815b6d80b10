"""Verifying what a substituter serves, as one who does not trust it: narinfo, NAR, bundles."""

from __future__ import annotations

import asyncio
import hashlib
import netrc
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

from pydantic import ValidationError

from narseal.config import UpstreamConfig
from narseal.cosign import bundle as bundles
from narseal.cosign.bundle import Bundle
from narseal.cosign.statement import PREDICATE_TYPE, Statement, contradictions
from narseal.cosign.verify import Verifier
from narseal.errors import (
    ConfigError,
    ContentMismatch,
    NarsealError,
    NotFound,
    Refused,
    Trouble,
)
from narseal.nix import narinfo
from narseal.nix.inspection import Inspection, Measured
from narseal.nix.keys import PublicKey
from narseal.nix.narinfo import NarInfo
from narseal.nix.store_path import is_hash_part
from narseal.runtime.threads import ThreadPools
from narseal.upstream import Upstream, connect

_CHUNK = 1 << 19
_MAX_NAR = 64 << 30
_MAX_ATTESTATIONS = 64
_KEPT_STATEMENTS = 256
_LIST = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one path."""

    path: str
    #: None if everything is as it should be.
    error: NarsealError | None
    seconds: float
    bytes: int = 0


def _source(url: str) -> UpstreamConfig:
    """A substituter with what the user's netrc says of it, as curl and Nix have it."""
    file = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    host = urlsplit(url).hostname
    try:
        with_netrc = host is not None and netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        with_netrc = False
    try:
        return UpstreamConfig(url=url, verify="content", netrc_file=file if with_netrc else None)
    except ValidationError as error:
        reasons = "; ".join(
            item["msg"].removeprefix("Value error, ") for item in error.errors(include_input=False)
        )
        raise ConfigError(f"--from: {reasons.replace('netrc_file', 'your netrc')}") from None


class Verification:
    """Checks paths of one substituter. Made by `opened`."""

    def __init__(
        self,
        upstream: Upstream,
        *,
        public_keys: Sequence[PublicKey],
        verifier: Verifier | None,
        store_dir: str,
        threads: ThreadPools,
    ) -> None:
        self._upstream = upstream
        self._keys = {key.name: key for key in public_keys}
        self._verifier = verifier
        self._store_dir = store_dir
        self._threads = threads
        #: Verified statements by the digests they cover: a batch is fetched once.
        self._statements: OrderedDict[bytes, Statement] = OrderedDict()
        self._by_digest: dict[bytes, bytes] = {}

    @classmethod
    @asynccontextmanager
    async def opened(
        cls,
        url: str,
        *,
        public_keys: Sequence[PublicKey],
        verifier: Verifier | None,
        parallel: int,
        store_dir: str = "/nix/store",
    ) -> AsyncIterator[Verification]:
        """Against the substituter at `url` (`http(s)://` or `file://`); ConfigError if it is none of these."""
        upstream = connect(_source(url))
        threads = ThreadPools(transfers=parallel)
        try:
            yield cls(
                upstream,
                public_keys=public_keys,
                verifier=verifier,
                store_dir=store_dir,
                threads=threads,
            )
        finally:
            await upstream.close()
            threads.close()

    async def listed(self) -> list[str]:
        """The hash parts of everything that the substituter has, if it says so.

        A folder shows its narinfos; narseal lists them at `/paths` for callers of its machine.
        """
        url = self._upstream.config.url
        if url.startswith("file://"):
            names = await self._threads.run(_narinfos, Path(url.removeprefix("file://")))
            return sorted(names)
        found: list[str] = []
        while True:
            name = f"paths/{found[-1]}" if found else "paths"
            data = await self._upstream.get(name, limit=_LIST)
            if data is None:
                raise NotFound(
                    f"{url} does not list its paths (narseal does, for callers of its own"
                    " machine); name the store paths instead"
                )
            more = data.decode("ascii", "replace").split()
            if not more:
                return found
            if not all(map(is_hash_part, more)) or more != sorted(more) or found[-1:] >= more[:1]:
                raise Refused("malformed", f"{url}/{name} is no list of hash parts in order")
            found += more

    async def each(
        self, hash_parts: Iterable[str], *, parallel: int, done: Callable[[Outcome], None]
    ) -> None:
        """Check many paths, some at a time; `done` is told of each."""
        waiting = iter(hash_parts)

        async def work() -> None:
            for hash_part in waiting:
                done(await self.outcome(hash_part))

        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(work())

    async def outcome(self, hash_part: str) -> Outcome:
        """Check one path; what is wrong is in the outcome."""
        start = perf_counter()
        name = hash_part
        try:
            info = await self._narinfo(hash_part)
            name = str(info.store_path)
            size = await self._check(info)
        except NarsealError as error:
            return Outcome(name, error, perf_counter() - start)
        return Outcome(name, None, perf_counter() - start, size)

    async def _narinfo(self, hash_part: str) -> NarInfo:
        data = await self._upstream.get(f"{hash_part}.narinfo", limit=narinfo.MAX_BYTES)
        if data is None:
            raise NotFound(f"{self._upstream.config.url} has no {hash_part}.narinfo")
        info = NarInfo.parse(data, store_dir=self._store_dir)
        if info.store_path.hash_part != hash_part:
            raise Refused("wrong-path", f"{hash_part}.narinfo is of {info.store_path}")
        message = info.fingerprint()
        if self._keys and not any(
            self._keys[signature.key_name].verifies(message, signature)
            for signature in info.signatures
            if signature.key_name in self._keys
        ):
            names = ", ".join(self._keys)
            raise Refused("unsigned", f"{info.store_path}: no good signature by {names}")
        if info.nar_size > _MAX_NAR:
            raise Refused("too-large", f"{info.store_path}: {info.nar_size} bytes")
        return info

    async def _check(self, info: NarInfo) -> int:
        measured = await self._threads.run_transfer(self._measure, info)
        if info.file_hash not in (None, measured.file_hash):
            raise ContentMismatch(
                "content-mismatch", f"{info.store_path}: the file's hash is {measured.file_hash}"
            )
        if self._verifier is not None:
            statement = await self._statement(measured.file_hash.digest)
            if wrong := contradictions(statement, info):
                raise Refused("bad-bundle", f"{info.store_path}: {'; '.join(wrong)}")
        return measured.file_size

    def _measure(self, info: NarInfo) -> Measured:
        """In a thread: the whole NAR, decoded and hashed."""
        inspection = Inspection(info)
        with self._upstream.open(info.url, 0) as body:
            while data := body.read(_CHUNK):
                inspection.feed(data)
        return inspection.finish()

    async def _statement(self, digest: bytes) -> Statement:
        """A verified statement of narseal's that covers a file."""
        known = self._by_digest.get(digest)
        if known is not None and known in self._statements:
            return self._statements[known]
        name = f"attestations/sha256:{digest.hex()}"
        data = await self._upstream.get(name, limit=2 * bundles.MAX_BYTES)
        if data is None:
            raise Refused("bad-bundle", f"there is no attestation of sha256:{digest.hex()}")
        last: NarsealError = Refused("bad-bundle", f"{name} has no attestation of {PREDICATE_TYPE}")
        for line in data.splitlines()[:_MAX_ATTESTATIONS]:
            try:
                statement = await self._threads.run(self._verify, line, digest)
            except NarsealError as error:
                last = error
                continue
            if statement is not None:
                self._remember(hashlib.sha256(line).digest(), statement)
                return statement
        raise last

    def _verify(self, line: bytes, digest: bytes) -> Statement | None:
        """In a thread: a bundle's statement, None if it is of another kind."""
        assert self._verifier is not None  # the caller saw to it
        statement = self._verifier.verify(Bundle.parse(line), digest).statement
        ours = statement is not None and statement.predicate_type == PREDICATE_TYPE
        return statement if ours else None

    def _remember(self, key: bytes, statement: Statement) -> None:
        self._statements[key] = statement
        for subject in statement.subjects:
            self._by_digest[subject.digest] = key
        while len(self._statements) > _KEPT_STATEMENTS:
            _, old = self._statements.popitem(last=False)
            for subject in old.subjects:
                self._by_digest.pop(subject.digest, None)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """0 good, 1 something is wrong, 3 nothing is, but not all could be asked."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if any(not isinstance(error, Trouble) for error in errors):
        return 1
    return 3 if errors else 0


def _narinfos(folder: Path) -> list[str]:
    names = (path.name.removesuffix(".narinfo") for path in folder.glob("*.narinfo"))
    return [name for name in names if is_hash_part(name)]
