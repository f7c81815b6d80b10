"""Uploads that come together: on disk, all of them, before anybody is told so."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import itertools
import os
import re
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientSession

from narseal.custody import tokens
from narseal.custody.file import FileKey
from narseal.custody.requests import Request
from narseal.nix.keys import Signature
from tests.faults.test_process import fetch, strace
from tests.faults.test_upload_storm import check, upload, uploading
from tests.tools.cache import Entry, entry
from tests.tools.narseal import Process, narseal, narseal_process
from tests.tools.tracing import Calls
from tests.tools.waiting import PATIENCE, until

ITEMS = [entry(f"item{n}", os.urandom(20_000), compression="zstd") for n in range(24)]
LARGE = entry("large", os.urandom(600_000), compression="zstd")


class Uploader:
    """Brings paths, each over a connection of its own."""

    def __init__(self, proxy: Process, token: str) -> None:
        self._address = urlsplit(proxy.url).netloc
        self._headers = {"Authorization": f"Bearer {token}"}
        #: From which port each one's narinfo came.
        self.ports: dict[str, int] = {}

    def bring(self, item: Entry) -> int:
        """The status of the narinfo, or of the NAR if it was not taken."""
        with closing(http.client.HTTPConnection(self._address, timeout=PATIENCE)) as connection:
            status = self._put(connection, item, item.info.url, item.file)
            if status != 201:
                return status
            return self._put(connection, item, f"{item.hash}.narinfo", item.info.render())

    def _put(
        self, connection: http.client.HTTPConnection, item: Entry, name: str, body: bytes
    ) -> int:
        connection.request("PUT", f"/{name}", body, self._headers)
        self.ports[item.hash] = connection.sock.getsockname()[1]
        response = connection.getresponse()
        response.read()
        return response.status

    def is_taken(self, item: Entry) -> bool:
        """Whether it could be brought, in the end; nothing but a server that dies is in the way."""
        try:
            return self.bring(item) in (200, 201)
        except (OSError, http.client.HTTPException):
            return False


def _all(act: Callable[[Entry], int], items: list[Entry]) -> list[int]:
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(act, items))


def test_what_is_answered_is_on_disk(tmp_path: Path) -> None:
    """What a loss of power at any moment leaves: whatever was answered, and no index without bytes."""
    token, settings = uploading(tmp_path)
    storage, trace = tmp_path / "storage", tmp_path / "trace"
    items = [*ITEMS, LARGE]
    calls = "trace=fsync,fdatasync,rename,write,writev,sendto,sendmsg"
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        with strace(proxy, "-yy", "-s", "12", "-e", calls, "-o", str(trace)):
            assert _all(uploader.bring, items) == [201] * len(items)
            until(lambda: len(list(storage.glob("*.narinfo"))) == len(items))
    seen = Calls(trace)
    for item in items:
        answers = f":{uploader.ports[item.hash]}]"
        answered = seen.at(answers, "HTTP/1.1 201", after=seen.at(answers, "HTTP/1.1 201"))
        assert seen.recorded(item) < answered, item.hash
    renames = [
        "/nar/" in line for line in seen.lines if re.search(r"rename\(|fsync\(.*/nar>", line)
    ]
    assert (True, True) in itertools.pairwise(renames), "no two were in a group"


@pytest.mark.parametrize("call", ["openat", "write", "fsync", "link", "rename", "unlink", "close"])
@pytest.mark.parametrize("number", [3, 9, 27])
def test_killed_while_a_group_is_taken(call: str, number: int, tmp_path: Path) -> None:
    """Whoever was told so finds his path; whoever was not brings it again; nothing is left over."""
    token, settings = uploading(tmp_path)
    inject = f"inject={call}:signal=KILL:when={number}"  # of a thread
    items, taken = list(ITEMS), list[bool]()
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        with strace(proxy, "-e", f"trace={call}", "-e", inject, "-o", "/dev/null") as tracer:
            with concurrent.futures.ThreadPoolExecutor(len(ITEMS)) as pool:
                taken += pool.map(uploader.is_taken, ITEMS)
            while tracer.poll() is None:  # no thread has called it so often
                items.append(entry(f"item{len(items)}", os.urandom(99), compression="zstd"))
                taken.append(uploader.is_taken(items[-1]))
        for item, was_taken in zip(items, taken, strict=True):
            if was_taken:
                assert uploader.bring(item) == 200
            until(partial(uploader.is_taken, item))
        folder = tmp_path / "storage"
        until(lambda: len(list(folder.glob("*.narinfo"))) == len(items))
        until(lambda: not any((folder / ".narseal/incoming").iterdir()))
        assert "a worker died" in proxy.log.read_text()
    assert check(tmp_path) == []


def test_a_narinfo_file_that_could_not_be_written_is_tried_again(tmp_path: Path) -> None:
    """Its path is served from the index meanwhile."""
    token, settings = uploading(tmp_path)
    item = ITEMS[0]
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        file = tmp_path / "storage" / f"{item.hash}.narinfo"
        file.mkdir()  # in its way
        assert uploader.bring(item) == 201
        until(lambda: "narinfo files are not written" in proxy.log.read_text())
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 200
        file.rmdir()
        until(file.is_file)


@pytest.mark.parametrize("worker", [0, 1])
def test_what_a_killed_worker_was_to_write_another_writes(worker: int, tmp_path: Path) -> None:
    """Whichever of them looks after the folder: it is told that one died."""
    token, settings = uploading(tmp_path)
    items: list[Entry] = []
    with narseal_process(tmp_path, upload=settings, workers=2) as proxy:
        uploader = Uploader(proxy, token)
        kill = "inject=rename:signal=KILL:when=7"
        options = ("-e", "trace=rename", "-e", kill, "-o", "/dev/null")
        with strace(proxy, *options, worker=worker) as tracer:
            while tracer.poll() is None:
                group = [
                    entry(f"item{len(items)}-{n}", os.urandom(99), compression="zstd")
                    for n in range(8)
                ]
                taken = _all(uploader.is_taken, group)
                items += [item for item, was_taken in zip(group, taken, strict=True) if was_taken]
        storage = tmp_path / "storage"
        wanted = {f"{item.hash}.narinfo" for item in items}
        until(lambda: wanted <= {file.name for file in storage.glob("*.narinfo")})


def test_a_token_that_is_revoked_while_its_group_is_published_signs_nothing(
    tmp_path: Path,
) -> None:
    """Others' files, and a slow disk, may keep it waiting for long."""
    token, settings = uploading(tmp_path)
    item, trace = ITEMS[0], tmp_path / "trace"
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        slowly = "inject=fsync:delay_enter=3000000"
        with (
            strace(proxy, "-e", "trace=fsync", "-e", slowly, "-o", str(trace)),
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            status = pool.submit(uploader.bring, item)
            until(lambda: "fsync(" in trace.read_text())
            tokens.revoke(tmp_path / "tokens", "ci")
            assert status.result() == 401
        assert fetch(f"{proxy.url}/{item.hash}.narinfo")[0] == 404
        _, metrics = fetch(f"{proxy.url}/metrics")
        signed = re.findall(r'narseal_sign_seconds_count{.*kind="nix".*} (.*)', metrics.decode())
        assert not sum(map(float, signed)), "signed, though nothing shows it"


async def test_a_token_that_is_revoked_while_it_is_signed_for_pins_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent may take long."""
    token, more = uploading(tmp_path)
    sign = FileKey.sign

    async def slowly(key: FileKey, request: Request) -> Signature:
        signature = await sign(key, request)
        tokens.revoke(tmp_path / "tokens", "ci")
        await asyncio.sleep(0.05)
        return signature

    monkeypatch.setattr(FileKey, "sign", slowly)
    async with (
        narseal(tmp_path, upload=more) as client,
        ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
    ):
        assert await upload(session, client.url, ITEMS[0]) == 401
        assert (await client.get(f"{ITEMS[0].hash}.narinfo"))[0] == 404


def test_two_paths_of_one_nar_leave_nothing_over(tmp_path: Path) -> None:
    """A second link to a file that has its name already is not moved by a rename."""
    token, settings = uploading(tmp_path)
    twins = [entry(f"twin{n}", b"the same", compression="zstd") for n in range(6)]
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        assert set(_all(uploader.bring, twins)) == {201}
        until(lambda: len(list((tmp_path / "storage").glob("*.narinfo"))) == len(twins))
        assert not any((tmp_path / "storage/.narseal/incoming").iterdir())


def test_one_narinfo_file_that_cannot_be_written_keeps_no_other_from_it(tmp_path: Path) -> None:
    token, settings = uploading(tmp_path)
    with narseal_process(tmp_path, upload=settings) as proxy:
        uploader = Uploader(proxy, token)
        (tmp_path / "storage" / f"{ITEMS[0].hash}.narinfo").mkdir()  # in its way
        assert _all(uploader.bring, ITEMS) == [201] * len(ITEMS)
        until(
            lambda: (
                sum(f.is_file() for f in (tmp_path / "storage").glob("*.narinfo")) == len(ITEMS) - 1
            )
        )
