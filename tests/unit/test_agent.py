"""narseal's side of the line to a signer: what is asked together, and what of the answers is believed."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from narseal.custody import agent as agent_module
from narseal.custody import wire
from narseal.custody.agent import AgentKey
from narseal.custody.requests import PathRequest
from narseal.errors import Refused, Unavailable
from narseal.nix.keys import SecretKey
from narseal.nix.narinfo import NarInfo
from tests.tools.cache import entry
from tests.tools.narseal import OPERATOR
from tests.tools.waiting import PATIENCE, eventually

OTHER = SecretKey.from_seed(OPERATOR.name, bytes(32))
ITEMS = [entry(f"app-{n}", b"%d" % n) for n in range(200)]

Answers = Callable[[list[dict[str, Any]]], Sequence[dict[str, Any]]]


class FakeSigner:
    """Answers each frame with what `answers` makes of its requests; `several` None: one of before."""

    def __init__(self, answers: Answers, several: object) -> None:
        self._answers = answers
        self._several = several
        #: How many requests each frame had.
        self.frames: list[int] = []
        self._lines: set[asyncio.Task[None] | None] = set()

    async def end(self) -> None:
        """Leave nothing behind."""
        lines = [line for line in self._lines if line]
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines.add(asyncio.current_task())
        with closing(writer):
            await self._answer_all(reader, writer)

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = wire.Frames()
        while data := await reader.read(1 << 16):
            for body in frames.feed(data):
                trees: list[Any] = list(wire.decode_each(body))
                self.frames.append(len(trees))
                if trees[0]["kind"] == "keys":
                    found: list[dict[str, Any]] = [self._keys(trees[0]["id"])]
                elif len(trees) > 1 and self._several is None:
                    found = [{"id": None, "refused": "not a JSON object", "reason": "malformed"}]
                else:
                    found = list(self._answers(trees))
                writer.write(wire.encode_several(found, most=1 if self._several is None else 64))

    def _keys(self, number: int) -> dict[str, Any]:
        public = {"name": OPERATOR.name, "type": "ed25519", "public": str(OPERATOR.public)}
        more = {} if self._several is None else {"several": self._several}
        return {"id": number, "keys": [public]} | more


def signed(tree: dict[str, Any], by: Any = OPERATOR) -> dict[str, Any]:
    message = NarInfo.parse(tree["narinfo"].encode()).fingerprint()
    return {"id": tree["id"], "signature": base64.b64encode(by.sign(message).data).decode()}


def signed_each(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [signed(tree) for tree in reversed(trees)]  # in any order


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # a socket's path is short
        yield Path(name)


@asynccontextmanager
async def agent(
    folder: Path, answers: Answers = signed_each, several: object = wire.MAX_SEVERAL
) -> AsyncIterator[tuple[AgentKey, FakeSigner]]:
    fake = FakeSigner(answers, several)
    server = await asyncio.start_unix_server(fake.serve, folder / "s")
    found = await asyncio.to_thread(AgentKey, f"agent:{folder}/s")
    fake.frames.clear()
    try:
        yield found, fake
    finally:
        found.close()
        server.close()
        await fake.end()


async def sign_all(found: AgentKey) -> list[Any]:
    requests = [PathRequest(item.info, None) for item in ITEMS]
    return await asyncio.gather(*map(found.sign, requests), return_exceptions=True)


GOOD = [OPERATOR.sign(item.info.fingerprint()) for item in ITEMS]


async def test_what_is_asked_together_goes_in_few_frames(folder: Path) -> None:
    async with agent(folder) as (found, fake):
        assert await found.sign(PathRequest(ITEMS[0].info, None)) == GOOD[0]
        fake.frames.clear()
        assert await sign_all(found) == GOOD
        assert sum(fake.frames) == 200
        assert len(fake.frames) == 4 and max(fake.frames) <= wire.MAX_SEVERAL


@pytest.mark.parametrize("several", [None, 0, -3, "64", True, 1, 7, 10_000])
async def test_a_signer_gets_no_more_in_a_frame_than_it_says(folder: Path, several: object) -> None:
    """One of before says nothing, and knows of one."""
    async with agent(folder, several=several) as (found, fake):
        await found.sign(PathRequest(ITEMS[0].info, None))
        assert await sign_all(found) == GOOD
        most = several if type(several) is int and several > 0 else 1
        assert max(fake.frames) == min(most, wire.MAX_SEVERAL)


async def test_of_many_answers_each_is_held_to_the_key_and_to_its_own_message(
    folder: Path,
) -> None:
    """Swapped, by another key of the same name, cut off, none, no text of bytes: those are not taken, the others are."""

    def answers(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = [signed(tree) for tree in trees]
        if len(found) > 9:
            found[0]["id"], found[1]["id"] = found[1]["id"], found[0]["id"]
            found[2] = signed(trees[2], by=OTHER)
            found[3]["signature"] = found[3]["signature"][:-4]
            found[4] = {"id": found[4]["id"]}
            found[5] = {"id": found[5]["id"], "refused": "no evidence"}
            found[6] = {"id": found[6]["id"], "error": "the disk is full"}
            found[7]["signature"] = 7
            found[8]["signature"] = "é"
        return found

    async with agent(folder, answers) as (found, fake):
        await found.sign(PathRequest(ITEMS[0].info, None))
        fake.frames.clear()
        async with asyncio.timeout(PATIENCE):
            outcomes = await sign_all(found)
        assert len(outcomes) == len(GOOD)
        bad = sum(9 for size in fake.frames if size > 9)
        refused = [o for o in outcomes if isinstance(o, Refused)]
        unavailable = [o for o in outcomes if isinstance(o, Unavailable)]
        good = [o for o, g in zip(outcomes, GOOD, strict=True) if o == g]
        assert len(refused) == bad // 9 and len(refused) + len(unavailable) == bad
        assert len(good) == 200 - bad
        assert any("restart narseal" in str(error) for error in unavailable)
        assert any("cannot be read: ValueError" in str(error) for error in unavailable)


@pytest.mark.parametrize("lines", ["1e999", '"one"', "[1]"])
async def test_a_head_that_cannot_be_read_is_told_to_who_asked(folder: Path, lines: str) -> None:
    def answers(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"id": tree["id"], "lines": json.loads(lines), "hash": "00" * 32} for tree in trees]

    async with agent(folder, answers) as (found, _):
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(Unavailable, match=r"cannot be read|is not JSON"):
                await found.head()


async def test_whatever_an_answer_does_to_who_reads_it_he_is_told(folder: Path) -> None:
    def read(answer: dict[str, Any]) -> None:
        raise RuntimeError("nobody thought of that")

    async with agent(folder) as (found, _):
        with pytest.raises(Unavailable, match="cannot be read: RuntimeError"):
            await found._line.ask(PathRequest(ITEMS[0].info, None).render(), read)


async def test_a_signer_that_cannot_read_says_so_and_nobody_waits(folder: Path) -> None:
    """It is asked once: it is there, and the same request again would not be read, either."""

    def answers(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"id": None, "refused": "not my dialect", "reason": "malformed"}]

    async with agent(folder, answers) as (found, fake):
        with pytest.raises(Unavailable, match=r"not my dialect.*update the older") as told:
            await found.sign(PathRequest(ITEMS[0].info, None))
        assert "away" not in str(told.value)
        assert len(fake.frames) == 2  # what a new line asks first, and this


class Clock:
    """The running loop's, which goes on when the test says so, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real = loop.time
        self._ahead = 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self._ahead)

    def pass_by(self, seconds: float) -> None:
        self._ahead += seconds


async def test_who_gets_no_answer_is_told_so_and_others_get_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_ANSWER", PATIENCE)
    clock = Clock(monkeypatch)
    silent = ITEMS[3].info.fingerprint()

    def answers(trees: list[dict[str, Any]]) -> list[dict[str, Any]]:
        infos = [(tree, NarInfo.parse(tree["narinfo"].encode())) for tree in trees]
        return [signed(tree) for tree, info in infos if info.fingerprint() != silent]

    async with agent(folder, answers) as (found, _):
        for _ in range(2):
            signing = [asyncio.create_task(found.sign(PathRequest(i.info, None))) for i in ITEMS]
            others = [*signing[:3], *signing[4:]]
            assert await asyncio.gather(*others) == [*GOOD[:3], *GOOD[4:]]
            clock.pass_by(PATIENCE)
            with pytest.raises(Unavailable, match="does not answer"):
                await signing[3]
            # Nobody waits any more, and the next who does is told, too.
            assert await found.sign(PathRequest(ITEMS[0].info, None)) == GOOD[0]
            clock.pass_by(PATIENCE)


@contextmanager
def unread(threads: ThreadPoolExecutor) -> Iterator[None]:
    """Its only thread is busy: no answer is read meanwhile."""
    held = threading.Event()
    threads.submit(held.wait)
    try:
        yield
    finally:
        held.set()


async def test_the_deadline_and_the_end_of_the_line_reach_who_waits_for_an_answer_to_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_ANSWER", PATIENCE)
    clock = Clock(monkeypatch)
    async with agent(folder) as (found, _):
        assert await found.sign(PathRequest(ITEMS[0].info, None)) == GOOD[0]
        line = found._line._connection
        assert line
        threads = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(threads)

        async def is_being_read() -> bool:
            return len(line._reading) > 0

        async def is_let_go() -> bool:
            return not line._reading

        async def is_over() -> bool:
            return line._watch is None

        with unread(threads):
            signing = asyncio.create_task(sign_all(found))
            await eventually(is_being_read)
            clock.pass_by(PATIENCE)
            await eventually(is_over)
        assert {str(o).rpartition(" does ")[2] for o in await signing} == {"not answer"}
        await eventually(is_let_go)
        with unread(threads):
            signing = asyncio.create_task(sign_all(found))
            await eventually(is_being_read)
            found.close()
            await eventually(is_let_go)
        assert await signing == GOOD  # by a new line
