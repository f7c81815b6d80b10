"""OIDC tokens of CI systems as upload tokens: issuer, audience, exact subject and claims."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import jwt

from narseal import __version__
from narseal.config import OidcConfig
from narseal.custody.tokens import Token
from narseal.errors import Malformed, UpstreamTrouble
from narseal.nix.bounded_json import load_json
from narseal.runtime.portions import READ_AHEAD, in_turns
from narseal.runtime.tasks import BackgroundTasks
from narseal.runtime.threads import ThreadPools

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_KEPT_SECONDS = 300.0
_AGAIN_SECONDS = 10.0
_TIMEOUT = 10.0  # for all of what an issuer is asked
_MAX_BYTES = 1 << 20
_MAX_KEYS = 100
_LEEWAY = 10


class Oidc:
    """Checks tokens of the issuers that the configuration names."""

    def __init__(
        self, configs: Sequence[OidcConfig], threads: ThreadPools, tasks: BackgroundTasks
    ) -> None:
        self._configs = configs
        self._threads = threads
        self._keys = {config.issuer: _Keys(config.issuer, threads, tasks) for config in configs}

    async def check(self, text: str) -> Token | None:
        """What the token may upload; None if no rule takes it.

        UpstreamTrouble if its issuer's keys cannot be had: then it is not known.
        """
        issuer, kid = claimed(text)
        rules = [config for config in self._configs if config.issuer == issuer]
        if not rules:
            return None
        key = await self._keys[rules[0].issuer].get(kid)
        return await self._threads.run(_first_held, text, rules, key) if key else None


def claimed(text: str) -> tuple[str, str]:
    """The issuer and the key that a token names, unverified; empty if nothing like it is taken."""
    try:
        header = jwt.get_unverified_header(text)
        issuer = jwt.decode(text, options={"verify_signature": False}).get("iss")
    except (jwt.PyJWTError, ValueError, RecursionError):
        return "", ""
    if not isinstance(issuer, str) or header.get("alg") not in _ALGORITHMS:
        return "", ""
    return issuer, str(header.get("kid", ""))


def _first_held(text: str, rules: Sequence[OidcConfig], key: jwt.PyJWK) -> Token | None:
    """In a thread: the token as the first rule sees it that takes it."""
    return next((token for rule in rules if (token := held(text, rule, key))), None)


def held(text: str, rule: OidcConfig, key: jwt.PyJWK) -> Token | None:
    """The token as one rule sees it; None if it does not hold, or its claims are none."""
    try:
        claims = jwt.decode(
            text,
            key,
            algorithms=_ALGORITHMS,
            audience=rule.audience,
            issuer=rule.issuer,
            leeway=_LEEWAY,
            options={"require": ["exp", "iat", "iss", "aud", "sub"]},
        )
        wanted = rule.claims | ({"sub": rule.identity} if rule.identity else {})
        if any(claims.get(name) != value for name, value in wanted.items()):
            return None
        who = f"{rule.issuer} {claims['sub']}".encode()  # half a surrogate pair is no text
        expires = float(claims["exp"])  # neither is a number of a thousand digits a time
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    name = f"oidc-{hashlib.sha256(who).hexdigest()[:16]}"
    return Token(name, str(claims["sub"])[:100], rule.allow, expires, "")


class _Keys:
    """An issuer's JWKS: kept for minutes, asked for anew when a key is unknown, not too often.

    Whoever needs them waits for one and the same question, which has a deadline and takes no
    thread. What it failed with is remembered, too: tokens that anybody may forge cause no more of
    them than good ones do.
    """

    def __init__(self, issuer: str, threads: ThreadPools, tasks: BackgroundTasks) -> None:
        self._issuer = issuer
        self._threads = threads
        self._tasks = tasks
        self._by_id: dict[str, jwt.PyJWK] = {}
        self._fetched = self._asked = -_KEPT_SECONDS
        self._failure: UpstreamTrouble | None = None
        self._asking: asyncio.Task[None] | None = None

    async def get(self, kid: str) -> jwt.PyJWK | None:
        """The key of a token; None if the issuer has none of that name."""
        now = time.monotonic()
        is_fresh = now - self._fetched <= _KEPT_SECONDS
        if is_fresh and kid in self._by_id:
            return self._by_id[kid]
        if self._asking is None and now - self._asked > _AGAIN_SECONDS:
            self._asked = now
            self._asking = self._tasks.start(self._ask(), f"keys of {self._issuer}")
        if self._asking is not None:
            await asyncio.shield(self._asking)
        if self._failure:
            raise self._failure
        return self._by_id.get(kid)

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT), _session() as session:
                discovery = await self._object(session, f"{self._issuer}/{_DISCOVERY}")
                if discovery.get("issuer") != self._issuer:
                    raise ValueError(f"its discovery names {str(discovery.get('issuer'))[:200]!a}")
                tree = await self._object(session, str(discovery["jwks_uri"]))
            self._by_id = await self._threads.run(keys_of, tree)
            self._failure = None
            self._fetched = time.monotonic()
        except (*_FAILURES, jwt.PyJWTError, Malformed, ValueError, KeyError, TypeError) as error:
            what = "no answer in time" if isinstance(error, TimeoutError) else f"{error!r}"[:300]
            self._failure = UpstreamTrouble(
                f"the keys of {self._issuer} cannot be had, so its tokens cannot be checked: {what}"
            )
        finally:
            self._asking = None

    async def _object(self, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
        """A JSON object of an issuer's."""
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError(f"{url}: {response.status}")
            data = bytearray()
            async for chunk in in_turns(response.content.iter_any()):
                data += chunk
                if len(data) > _MAX_BYTES:
                    raise ValueError(f"{url}: more than {_MAX_BYTES} bytes")
        tree = await self._threads.run(lambda: load_json(bytes(data), what=url))
        if not isinstance(tree, dict):
            raise TypeError(f"{url}: not a JSON object")
        return tree


_DISCOVERY = ".well-known/openid-configuration"
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=READ_AHEAD,
        headers={"Accept-Encoding": "identity", "User-Agent": f"narseal/{__version__}"},
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT),
    )


def keys_of(tree: dict[str, Any]) -> dict[str, jwt.PyJWK]:
    """In a thread: a JWKS (RFC 7517) as keys by their ids; Malformed if it has no key to use."""
    if isinstance(tree.get("keys"), list) and len(tree["keys"]) > _MAX_KEYS:
        raise Malformed(f"more than {_MAX_KEYS} keys")
    try:
        found = jwt.PyJWKSet.from_dict(tree).keys
    except Exception as error:
        # libraries that promise no error of their own for hostile numbers and types; whichever
        # it is, there are no keys
        raise Malformed(f"its keys cannot be read: {error!r}"[:300]) from error
    return {str(key.key_id): key for key in found if key.key_id}
