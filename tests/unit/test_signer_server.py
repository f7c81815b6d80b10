"""The signer's threads: what several consider at a time is answered once each, and written down once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from narseal.config.signer import SignerConfig
from narseal.custody import wire, write_private
from narseal.custody.requests import PathRequest
from narseal.nix.keys import Signature
from narseal.signer import audit
from narseal.signer.rules import SigningRules
from narseal.signer.server import SignerServer
from tests.tools.cache import Entry, entry, key
from tests.tools.narseal import OPERATOR, UPSTREAM
from tests.tools.waiting import PATIENCE

GOOD = [entry(f"app-{n}", b"%d" % n).signed(UPSTREAM) for n in range(300)]
BAD = [entry(f"bad-{n}", b"%d" % n) for n in range(60)]


def request(item: Entry, number: int) -> dict[str, Any]:
    return PathRequest(item.info, None).render() | {"key": OPERATOR.name, "id": number}


async def asked(path: str, items: list[Entry]) -> dict[int, dict[str, Any]]:
    """The answers to all of them, over a line of its own, with the log's head asked for in between."""
    reader, writer = await asyncio.open_unix_connection(path)
    trees = [request(item, number) for number, item in enumerate(items)]
    trees[10:10] = [{"kind": "head", "id": 1000 + number} for number in range(200)]
    writer.write(wire.encode_several(trees))
    frames, found = wire.Frames(), dict[int, dict[str, Any]]()
    async with asyncio.timeout(PATIENCE):
        while len(found) < len(trees):
            for body in frames.feed(await reader.read(1 << 16)):
                for tree in wire.decode_each(body):
                    assert isinstance(tree, dict) and tree["id"] not in found
                    found[tree["id"]] = tree
    writer.close()
    return found


@pytest.mark.parametrize("threads", [1, 3])
async def test_each_is_answered_once_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    write_private(tmp_path / "operator.secret", OPERATOR.render())
    write_private(tmp_path / "audit.secret", key("audit-1").render())
    tree: dict[str, Any] = {
        "trusted_keys": [str(UPSTREAM.public)],
        "key": [{"url": f"file:{tmp_path}/operator.secret"}],
        "audit": {"log": f"{tmp_path}/log", "key": f"file:{tmp_path}/audit.secret"},
    }
    rules = SigningRules(SignerConfig(**tree))
    stop = asyncio.Event()
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("s")
    server = SignerServer(rules, users=[os.geteuid()], threads=threads)
    serving = asyncio.create_task(server.serve(sock, checkpoint=3600, stop=stop))
    items = [*GOOD[:150], *BAD, *GOOD[150:]]
    lines = await asyncio.gather(*(asked("s", items) for _ in range(4)))
    stop.set()
    await serving
    rules.close()
    written = (tmp_path / "log").read_bytes().splitlines()
    digests = {json.loads(line)["n"]: line for line in written}
    for found in lines:
        for number, item in enumerate(items):
            if item in BAD:
                assert "refused" in found[number]
                continue
            signature = Signature(OPERATOR.name, base64.b64decode(found[number]["signature"]))
            assert OPERATOR.public.verifies(item.info.fingerprint(), signature)
        for number in range(200):  # how long the log was and its last line belong together
            head = found[1000 + number]
            last = digests[head["lines"]] if head["lines"] else None
            assert head["hash"] == (hashlib.sha256(last).hexdigest() if last else "")
    assert audit.verify(tmp_path / "log", key("audit-1").public).problems == ()
    subjects = [json.loads(line).get("subject") for line in written]
    for item in GOOD:
        assert subjects.count(f"/nix/store/{item.info.store_path}") == 4
    assert len(written) == 4 * len(GOOD) + 1  # and a checkpoint
