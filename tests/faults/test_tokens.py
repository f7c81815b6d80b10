"""Upload tokens that end while a request is under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from narseal.custody import tokens
from tests.faults.test_uploads import ITEM, uploading


async def test_what_a_revoked_token_began_is_not_signed(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        assert (await uploader.put(ITEM.info.url, ITEM.file))[0] == 201
        body = ITEM.info.render()
        url = urlsplit(uploader.client.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        head = f"PUT /{ITEM.hash}.narinfo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
        head += f"Content-Length: {len(body)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in uploader.headers.items())
        writer.write(f"{head}\r\n".encode())
        assert b" 100 " in await reader.readline()
        assert await reader.readline() == b"\r\n"
        writer.write(body[:-1])
        await writer.drain()
        tokens.revoke(tmp_path / "tokens", "ci")
        writer.write(body[-1:])
        assert b" 401 " in await reader.readline()
        writer.close()
        async with uploader.client.session.get(
            f"{uploader.client.url}/{ITEM.hash}.narinfo"
        ) as response:
            assert response.status == 404
