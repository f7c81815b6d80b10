"""OIDC tokens of CI systems as upload tokens, from a real issuer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest

from narseal.server import oidc
from tests.faults.test_uploads import ITEM, OTHER, Uploader
from tests.tools.narseal import narseal
from tests.tools.sigstore.issuer import Issuer

SUBJECT = "repo:example/app:ref:refs/heads/main"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.close()


@asynccontextmanager
async def uploading(folder: Path, issuer: Issuer, **rule: Any) -> Any:
    rule = {"issuer": issuer.url, "audience": "narseal", "identity": SUBJECT,
            "allow": ["my-app-*"]} | rule  # fmt: skip
    async with narseal(folder, upload={"enabled": True, "oidc": [rule]}) as client:
        yield lambda token: Uploader(client, token)


def unsigned(issuer: Issuer) -> str:
    claims = jwt.decode(good(issuer), options={"verify_signature": False})
    parts = [{"alg": "none", "typ": "JWT", "kid": "1"}, claims]
    return ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts
    ) + "."  # fmt: skip


def good(issuer: Issuer, **claims: Any) -> str:
    return issuer.token(SUBJECT, **({"aud": "narseal"} | claims))


async def test_a_ci_systems_token_uploads_what_its_rule_covers(
    tmp_path: Path, issuer: Issuer
) -> None:
    async with uploading(tmp_path, issuer) as bearing:
        uploader = bearing(good(issuer))
        assert await uploader.path(ITEM) == (201, "")
        status, text = await uploader.path(OTHER)
        assert (status, "does not cover" in text) == (403, True)


@pytest.mark.parametrize(
    "what",
    ["audience", "issuer", "subject", "prefix of the subject", "expired", "no expiry", "alg none",
     "another key", "symmetric", "rubbish"],
)  # fmt: skip
async def test_tokens_that_are_not_taken(what: str, tmp_path: Path, issuer: Issuer) -> None:
    stranger = Issuer()
    stranger.url = issuer.url
    pem = "-----BEGIN PUBLIC KEY-----"
    makers: dict[str, Callable[[], str]] = {
        "audience": lambda: issuer.token(SUBJECT),
        "issuer": lambda: good(issuer, iss="https://elsewhere.example"),
        "subject": lambda: issuer.token("repo:evil/app:ref:refs/heads/main", aud="narseal"),
        "prefix of the subject": lambda: issuer.token(f"{SUBJECT}2", aud="narseal"),
        "expired": lambda: good(issuer, exp=1_000_000_000),
        "no expiry": lambda: good(issuer, exp=None),
        "alg none": lambda: unsigned(issuer),
        "another key": lambda: good(stranger),
        "symmetric": lambda: jwt.encode(
            jwt.decode(good(issuer), options={"verify_signature": False}), pem * 2, "HS256",
            headers={"kid": "1"},
        ),
        "rubbish": lambda: "a.b.c",
    }  # fmt: skip
    token = makers[what]()
    async with uploading(tmp_path, issuer) as bearing:
        status, _ = await bearing(token).put(ITEM.info.url, ITEM.file)
        assert status == 401
    stranger.close()


async def test_other_claims_compare_exactly(tmp_path: Path, issuer: Issuer) -> None:
    rule = {"identity": None, "claims": {"repository": "example/app", "ref_protected": True}}
    async with uploading(tmp_path, issuer, **rule) as bearing:
        claims = {"repository": "example/app", "ref_protected": True}
        assert (await bearing(good(issuer, **claims)).path(ITEM))[0] == 201
        for wrong in ({"repository": "example/app"}, claims | {"ref_protected": "true"},
                      claims | {"repository": "example/app2"}):  # fmt: skip
            assert (await bearing(good(issuer, **wrong)).put("nix-cache-info", b""))[0] == 401


@pytest.mark.parametrize(
    "odd",
    [{"sub": "half a pair \ud800"}, {"exp": 10**400}, {"exp": float("inf")}, {"exp": "never"},
     {"iat": [1]}, {"nbf": {}}, {"sub": ["a"]}, {"sub": None}, {"aud": [1]}, {"aud": {"narseal": 1}}],
)  # fmt: skip
async def test_odd_claims_of_a_good_issuer_are_401(
    odd: dict[str, Any], tmp_path: Path, issuer: Issuer
) -> None:
    """A time beyond counting and a subject that is no text were a 500."""
    rule = {"identity": None, "claims": {"repository": "example/app"}}
    async with uploading(tmp_path, issuer, **rule) as bearing:
        token = good(issuer, **({"repository": "example/app"} | odd))
        assert (await bearing(token).put("nix-cache-info", b""))[0] == 401


@pytest.mark.parametrize(
    "tree",
    [{}, {"keys": 7}, {"keys": []}, {"keys": [7]}, {"keys": [{"kty": "RSA", "alg": ["RS256"]}]},
     {"keys": [{"kty": "RSA", "n": 7, "e": "AQAB", "kid": "1"}]}, {"keys": [{"kty": "EC"}] * 101},
     {"keys": [{"kty": "OKP", "crv": [], "kid": "1"}]}],
)  # fmt: skip
async def test_an_issuer_with_odd_keys_is_trouble_and_no_fault(
    tree: dict[str, Any], tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer, "_keys", lambda: tree)
    async with uploading(tmp_path, issuer) as bearing:
        for _ in range(2):
            status, text = await bearing(good(issuer)).put("nix-cache-info", b"")
            assert (status, "cannot be had" in text) == (502, True), text


async def test_rotated_keys_are_found_and_old_ones_end(
    tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with uploading(tmp_path, issuer) as bearing:
        old, other_old = good(issuer), good(issuer, jti="other")
        assert (await bearing(old).put("nix-cache-info", b""))[0] == 200
        issuer.rotate()
        new = good(issuer)
        # an unknown key is asked for once in a while, not for each token
        assert (await bearing(new).put("nix-cache-info", b""))[0] == 401
        monkeypatch.setattr(oidc, "_AGAIN_SECONDS", 0.0)
        assert (await bearing(new).put("nix-cache-info", b""))[0] == 200
        assert (await bearing(other_old).put("nix-cache-info", b""))[0] == 401


async def test_issuer_out_of_reach_is_no_verdict(tmp_path: Path, issuer: Issuer) -> None:
    token = good(issuer)
    async with uploading(tmp_path, issuer) as bearing:
        issuer.close()
        status, text = await bearing(token).put("nix-cache-info", b"")
        assert (status, "cannot be had" in text) == (502, True)
