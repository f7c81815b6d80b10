"""Upload tokens that end while a request is under way, and a file of tokens that cannot be read."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from narseal.custody import tokens
from narseal.errors import ConfigError, NarsealError
from tests.faults.test_uploads import ITEM, uploading
from tests.tools.waiting import eventually


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


async def test_no_token_of_an_unreadable_file_is_good(tmp_path: Path) -> None:
    async with uploading(tmp_path) as uploader:
        file = tmp_path / "tokens"
        assert (await uploader.put(ITEM.info.url, ITEM.file))[0] == 201
        good = file.read_bytes()
        part = tmp_path / "part"
        part.write_bytes(b"{\n")
        part.chmod(0o600)
        part.replace(file)
        status, text = await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render())
        assert status == 503
        assert "tokens cannot be used" in text
        file.write_bytes(good)

        async def is_taken() -> bool:
            return (await uploader.put(f"{ITEM.hash}.narinfo", ITEM.info.render()))[0] == 201

        await eventually(is_taken)


@pytest.mark.parametrize(
    "change",
    [
        {"allow": "app-*"},
        {"allow": [1]},
        {"allow": None},
        {"expires": True},
        {"expires": "1"},
        {"id": 1},
    ],
)
def test_a_line_of_another_shape_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "tokens"
    tokens.add(file, "ci", allow=("app-*",), expires=None)
    file.write_text(json.dumps(json.loads(file.read_text()) | change) + "\n")
    with pytest.raises(ConfigError, match="not a file of `narseal token add`"):
        tokens.Tokens(file)


def test_a_chmod_that_mends_the_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    _, text = tokens.add(file, "ci", allow=("*",), expires=None)
    found = tokens.Tokens(file)
    file.chmod(0o644)
    file.touch()
    assert found.refresh()
    with pytest.raises(NarsealError):
        found.check(text, now=0)
    file.chmod(0o600)
    assert found.refresh()
    assert found.check(text, now=0)
