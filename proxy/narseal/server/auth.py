"""Who asks: a token as Bearer, or as the password of Basic, which is what Nix's netrc can send."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import time
from collections import OrderedDict
from contextlib import suppress

from aiohttp import web

from narseal.custody.tokens import Token, Tokens
from narseal.errors import Unauthorised
from narseal.runtime.threads import ThreadPools
from narseal.server.oidc import Oidc
from narseal.telemetry import metrics

_log = logging.getLogger(__name__)

_KEPT_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_JUST_NOW = 0.01  # seconds for which a bearer's own look counts as one that has just begun
_ADDRESSES = 10_000
_MAX_DELAY = 5.0
_MAX_TOKEN = 3500  # a head line has 4,096 bytes


class Gate:
    """Checks tokens. A good one is remembered by a keyed hash for some seconds."""

    def __init__(self, tokens: Tokens | None, oidc: Oidc | None, threads: ThreadPools) -> None:
        self._tokens = tokens
        self._oidc = oidc
        self._threads = threads
        self._salt = os.urandom(32)
        self._good: OrderedDict[bytes, tuple[Token, float]] = OrderedDict()
        self._failures: OrderedDict[str, int] = OrderedDict()
        self._looked = 0.0
        #: How often the file was read anew: a check that began before counts no more.
        self._version = tokens.version if tokens else 0

    async def identify(self, request: web.Request, *, anew: bool = False) -> Token:
        """The token that the request brings; Unauthorised if it brings none that is good.

        With `anew`, the file is looked at now: before what a token brought is signed, since it may
        have been revoked, or have expired, while the body came. TokensUnusable if the file cannot
        be read. Each failure makes the next answer to the same address slower.
        """
        text = _token(request.headers.get("Authorization", ""))
        now = time.monotonic()
        if self._tokens and (anew or now - self._looked > _LOOK_SECONDS):
            self._looked = now
            await self._threads.run(self.look)
        self._notice()
        key = hashlib.blake2b(text.encode(), key=self._salt).digest()
        known = self._good.get(key)
        if known and now < known[1] and (known[0].expires or time.time() + 1) > time.time():
            return known[0]
        token, version = None, -1
        while text and version != self._version:
            version = self._version
            token = await self._check(text)
        if token is None:
            await self._refuse(request.remote or "", given=bool(text))
            raise Unauthorised(
                "a token is needed: put it into your netrc as the password of this host, or send"
                " it as Authorization: Bearer"
            )
        self._failures.pop(request.remote or "", None)
        self._good[key] = (token, now + _KEPT_SECONDS)
        while len(self._good) > _ADDRESSES:
            self._good.popitem(last=False)
        return token

    def look(self) -> None:
        """Read the file of tokens, if it is another than before. Blocks, in any thread."""
        if self._tokens is None:
            return
        self._tokens.refresh()
        if self._tokens.fault:
            metrics.tokens_file_errors.inc()

    def _notice(self) -> None:
        """Forget who was good, if the file was read anew, whoever looked."""
        tokens = self._tokens
        if tokens is None or self._version == tokens.version:
            return
        self._version = tokens.version
        self._good.clear()
        if tokens.fault:
            _log.error("no token of the file is good: %s", tokens.fault)

    async def _check(self, text: str) -> Token | None:
        if self._oidc and text.count(".") == 2:
            return await self._oidc.check(text)
        tokens = self._tokens
        if tokens is None:
            return None
        return await self._threads.run(lambda: tokens.check(text, now=time.time()))

    async def _refuse(self, address: str, *, given: bool) -> None:
        """Count; a request without any token is how a client learns that one is needed."""
        if not given:
            return
        metrics.auth_failures.inc()
        count = self._failures.pop(address, 0) + 1
        self._failures[address] = count
        while len(self._failures) > _ADDRESSES:
            self._failures.popitem(last=False)
        if count > 3:
            await asyncio.sleep(min(_MAX_DELAY, 0.1 * 2 ** min(count - 3, 10)))


class Bearer:
    """Who brings something. To be asked anew before it is signed: a token may be revoked meanwhile."""

    def __init__(self, gate: Gate, request: web.Request) -> None:
        self._gate = gate
        self._request = request
        self._looked = -_JUST_NOW

    def look(self) -> None:
        """Look at the file of tokens. Blocks: for whoever is in a thread already."""
        self._looked = time.monotonic()
        self._gate.look()

    async def token(self) -> Token:
        """Whose token it is, by a look that began just now, or begins; errors as of `Gate.identify`."""
        is_fresh = time.monotonic() - self._looked < _JUST_NOW
        return await self._gate.identify(self._request, anew=not is_fresh)


def _token(header: str) -> str:
    """The token of an Authorization field (RFC 9110, section 11.6.2); "?" for what can be none."""
    scheme, _, value = header.partition(" ")
    found = "?" if header else ""
    if scheme.lower() == "bearer":
        found = value.strip()
    elif scheme.lower() == "basic":
        with suppress(ValueError):  # not base-64, or not UTF-8 in it
            found = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2] or "?"
    # bytes that are not UTF-8 come as surrogates; no token has any
    return found[:_MAX_TOKEN] if found.isascii() else "?"
