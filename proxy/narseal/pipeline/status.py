"""How a narseal stands: keys, signatures, queues, and the size of its storage."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from narseal import __version__
from narseal.errors import Unavailable
from narseal.nix.keys import PublicKey
from narseal.pipeline.services import Services
from narseal.telemetry import metrics

_WEIGH_EVERY = 10.0
_log = logging.getLogger(__name__)


class Status:
    """What pages, probes and metrics say."""

    def __init__(self, services: Services) -> None:
        self._index = services.index
        self._folder = services.folder
        self._countersigner = services.countersigner
        self._mode = services.config.cosign.mode

    async def tree(self) -> dict[str, Any]:
        """How it stands with keys, signatures and queues, as JSON."""
        revoked = await self._index.revocations.now()
        active = {key.public.name for key in await self._countersigner.active()}
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
                for key in self._countersigner.keys
            ],
            "lackSignatures": await self._index.paths.count_lacking(active) if active else 0,
            "cosign": {"mode": self._mode, "waiting": waiting, "since": since},
            "revoked": [asdict(revocation) for revocation in revoked.all],
        }

    async def ready(self) -> None:
        """Raises Unavailable if the index cannot be read, or the folder is not there."""
        await self._index.stored_bytes()
        await self._folder.check()

    async def public_keys(self) -> list[PublicKey]:
        """The operator's, less revoked ones."""
        revoked = (await self._index.revocations.now()).keys
        return list(self._countersigner.ring.without(revoked).keys)

    async def weigh(self) -> None:
        """Keep the metric of storage's size, until cancelled."""
        while True:
            try:
                metrics.storage_bytes.set(await self._index.stored_bytes())
            except Unavailable as error:
                _log.warning("%s", error)
            await asyncio.sleep(_WEIGH_EVERY)
