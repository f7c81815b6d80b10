"""An index alone, without a narseal around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from narseal.storage import Index, migrate


@asynccontextmanager
async def index(folder: Path, *, attest: bool = False) -> AsyncIterator[Index]:
    """A new one in a folder, empty."""
    url = f"sqlite:///{folder}/index.sqlite"
    migrate(url)
    found = Index(url, "/nix/store", attest=attest)
    running = asyncio.create_task(found.run())
    try:
        yield found
    finally:
        await found.close()
        await running
