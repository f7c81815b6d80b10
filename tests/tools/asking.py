"""Asking over HTTP for what is made behind the answers."""

from __future__ import annotations

import aiohttp

from tests.tools.waiting import eventually


async def must_come(session: aiohttp.ClientSession, url: str) -> bytes:
    """The body of the first 200 at an address."""
    body = b""

    async def there() -> bool:
        nonlocal body
        async with session.get(url) as response:
            body = await response.read()
            return response.status == 200

    await eventually(there, url)
    return body
