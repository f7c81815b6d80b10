"""OIDC tokens of CI systems as upload tokens: issuer, audience, exact subject and claims."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import jwt
import requests

from narseal.config import OidcConfig
from narseal.custody.tokens import Token
from narseal.errors import UpstreamTrouble

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA")
_KEPT_SECONDS = 300.0
_AGAIN_SECONDS = 10.0
_TIMEOUT = 10.0
_MAX_BYTES = 1 << 20
_LEEWAY = 10


class Oidc:
    """Checks tokens of the issuers that the configuration names. Its methods block."""

    def __init__(self, configs: Sequence[OidcConfig]) -> None:
        self._configs = configs
        self._keys = {config.issuer: _Keys(config.issuer) for config in configs}

    def check(self, text: str) -> Token | None:
        """What the token may upload; None if no rule takes it.

        UpstreamTrouble if its issuer's keys cannot be had: then it is not known.
        """
        try:
            header = jwt.get_unverified_header(text)
            issuer = jwt.decode(text, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError):
            return None
        rules = [config for config in self._configs if config.issuer == issuer]
        if not rules or header.get("alg") not in _ALGORITHMS:
            return None
        key = self._keys[rules[0].issuer].get(str(header.get("kid", "")))
        return next((token for rule in rules if (token := _held(text, rule, key))), None)


def _held(text: str, rule: OidcConfig, key: jwt.PyJWK | None) -> Token | None:
    """The token as one rule sees it."""
    if key is None:
        return None
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
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    wanted = rule.claims | ({"sub": rule.identity} if rule.identity else {})
    if any(claims.get(name) != value for name, value in wanted.items()):
        return None
    return Token("oidc", str(claims["sub"])[:100], rule.allow, float(claims["exp"]), "")


class _Keys:
    """An issuer's JWKS: kept for minutes, asked for anew when a key is unknown, not too often."""

    def __init__(self, issuer: str) -> None:
        self._issuer = issuer
        self._lock = threading.Lock()
        self._by_id: dict[str, jwt.PyJWK] = {}
        self._fetched = -_KEPT_SECONDS

    def get(self, kid: str) -> jwt.PyJWK | None:
        with self._lock:
            age = time.monotonic() - self._fetched
            if age > _KEPT_SECONDS or (kid not in self._by_id and age > _AGAIN_SECONDS):
                self._fetch()
            return self._by_id.get(kid)

    def _fetch(self) -> None:
        try:
            discovery = _json(f"{self._issuer}/.well-known/openid-configuration")
            if discovery.get("issuer") != self._issuer:
                raise ValueError(f"its discovery names the issuer {discovery.get('issuer')}")
            found = jwt.PyJWKSet.from_dict(_json(str(discovery["jwks_uri"])))
        except (
            requests.RequestException,
            jwt.PyJWTError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:
            raise UpstreamTrouble(
                f"the keys of {self._issuer} cannot be had, so its tokens cannot be checked: {error}"
            ) from error
        self._by_id = {str(key.key_id): key for key in found.keys if key.key_id}
        self._fetched = time.monotonic()


def _json(url: str) -> dict[str, Any]:
    with requests.get(url, timeout=_TIMEOUT, stream=True, allow_redirects=False) as response:
        response.raise_for_status()
        data = response.raw.read(_MAX_BYTES + 1, decode_content=True)
    if response.status_code != 200 or len(data) > _MAX_BYTES:
        raise ValueError(f"{url}: {response.status_code}, {len(data)} bytes")
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise TypeError(f"{url}: not a JSON object")
    return tree
