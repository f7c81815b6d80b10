"""Misses of the hot path: what is asked in one plain request, and is not in memory, is answered likewise.

They are narinfos and small NARs, for which nothing but the index or an upstream is needed.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from time import perf_counter

from aiohttp import web

from narseal.errors import NarsealError
from narseal.nix.base32 import CHARS
from narseal.nix.compression import COMPRESSIONS
from narseal.pipeline.caches import Hot
from narseal.runtime.slots import asker
from narseal.server.failure import failure, fault
from narseal.server.hot_answers import HotAnswers
from narseal.server.tally import Tally
from narseal.telemetry.logs import new_request_id, request_id

_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(set(COMPRESSIONS.values())) if suffix)
#: A regular expression for the name of a NAR file.
FILE = rf"{CHARS}{{52}}\.nar(?:{_SUFFIX})?"
_TARGET = re.compile(rf"/(?:({CHARS}{{32}})\.narinfo|nar/({FILE}))".encode(), re.ASCII)


@dataclass(frozen=True, slots=True)
class Miss:
    """A request for what is not in memory."""

    #: `narinfo` or `nar`.
    route: str
    #: The hash part, or the file's name.
    key: str
    target: bytes
    #: When it came (perf_counter).
    start: float
    #: It is a HEAD.
    only_looks: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: from behind `Date:` on, as with `Hot`."""

    status: int
    rest: bytes


class Misses:
    """Answers them for one worker."""

    def __init__(self, answers: HotAnswers, tally: Tally) -> None:
        self._answers = answers
        self._tally = tally

    @staticmethod
    def of(target: bytes, start: float, *, only_looks: bool) -> Miss | None:
        """What the target of a GET or HEAD asks for; None if it is nothing of this kind."""
        found = _TARGET.fullmatch(target)
        if found is None:
            return None
        narinfo, nar = found.groups()
        route, key = ("narinfo", narinfo) if narinfo else ("nar", nar)
        return Miss(route, key.decode("ascii"), target, start, only_looks)

    async def answer(self, miss: Miss, address: str) -> Answer | None:
        """The answer to a client's request; None: only aiohttp's handlers can give one.

        To be run in a task of its own. A task that is cancelled stands for a client that left.
        """
        name = new_request_id()
        request_id.set(name)
        asker.set(address)
        try:
            answer = await self._found(miss, name)
        except asyncio.CancelledError:
            self._count(miss, 499)  # the client left, as nginx has it
            raise
        if answer is not None:
            self._count(miss, answer.status)
        return answer

    async def _found(self, miss: Miss, name: str) -> Answer | None:
        looks = miss.only_looks
        found: Hot | None
        try:
            if miss.route == "narinfo":
                found = await self._answers.narinfo(miss.key, only_looks=looks)
            else:
                found = await self._answers.small_nar(miss.key, only_looks=looks)
            answer = Answer(200, found.rest) if found else None
        except NarsealError as error:
            answer = _rendered(failure(error), name)
        except Exception:
            answer = _rendered(fault(f"{_method(miss)} {miss.target.decode('ascii')}"), name)
        if answer and looks:
            head, end, _ = answer.rest.partition(b"\r\n\r\n")
            answer = Answer(answer.status, head + end)
        return answer

    def _count(self, miss: Miss, status: int) -> None:
        seconds = perf_counter() - miss.start
        self._tally.answered(
            miss.route, _method(miss), miss.target.decode("ascii"), status, seconds
        )


def _method(miss: Miss) -> str:
    return "HEAD" if miss.only_looks else "GET"


def _rendered(response: web.Response, name: str) -> Answer:
    body = response.body
    assert isinstance(body, bytes)  # it was made of a text
    fields = {**response.headers, "Content-Length": str(len(body)), "X-Request-Id": name}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    return Answer(response.status, f"{lines}Server: narseal\r\n\r\n".encode() + body)
