"""What is fuzzed, and what must hold for any bytes: an answer, or an error of our own tree."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519

from narseal.client import cluster_image_policy
from narseal.config import Config, OidcConfig
from narseal.config.signer import SignerConfig
from narseal.cosign import statement, trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey, CosignPublicKey
from narseal.cosign.services import Log
from narseal.cosign.verify import ByIdentity, Verifier
from narseal.custody import requests, tokens, wire
from narseal.errors import Malformed, NarsealError
from narseal.nix.bounded_json import load_json
from narseal.nix.cache_info import CacheInfo
from narseal.nix.compression import decompressor
from narseal.nix.content_address import ContentAddress
from narseal.nix.hashes import Hash
from narseal.nix.keys import PublicKey, SecretKey, Signature
from narseal.nix.nar_reader import NarReader, NarSummary
from narseal.nix.narinfo import NarInfo
from narseal.nix.realisation import parse_at
from narseal.nix.store_path import StorePath
from narseal.server import oidc
from narseal.server.conditional import Unsatisfiable, etag_matches, parse_range
from tests.fuzz import seeds
from tests.tools.nar_reader import ReferenceNarReader

#: What a decoder may make of one input before the reader has had enough of it.
_MAX_DECODED = 8 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """One parser: `run` returns for every input; an exception that it lets through is a finding."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _own_errors(parse: Callable[[bytes], object]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with suppress(NarsealError):
            parse(data)

    return run


def _text(parse: Callable[[str], object]) -> Callable[[bytes], None]:
    """A parser of text, by what a lenient and a strict reader of headers would hand it."""
    return _own_errors(lambda data: parse(data.decode("utf-8", "surrogateescape")))


def _same_again(data: bytes) -> None:
    """A narinfo that is taken says the same when it is rendered and read once more."""
    info = NarInfo.parse(data)
    again = NarInfo.parse(info.render())
    assert again == info
    assert again.fingerprint() == info.fingerprint()


def _realisation(data: bytes) -> None:
    name, _, body = data.partition(b"\n")
    where = name.decode("utf-8", "surrogateescape")
    found = parse_at(where, body)
    assert parse_at(where, found.render()).fingerprint() == found.fingerprint()


def _nar(data: bytes) -> None:
    """In any portions, the reader comes to the judgement of the one that reads token by token."""
    half, tenth = len(data) // 2, len(data) // 10 + 1
    expected = _judgement(ReferenceNarReader, [data])
    assert _judgement(NarReader, [data]) == expected
    assert _judgement(NarReader, [data[:half], data[half:]]) == expected
    portions = [data[at : at + tenth] for at in range(0, len(data), tenth)]
    assert _judgement(NarReader, portions) == expected


def _judgement(
    make: type[NarReader | ReferenceNarReader], portions: list[bytes]
) -> tuple[NarSummary, list[bytes], bytes] | None:
    files: list[bytes] = []
    contents = bytearray()
    size = sum(map(len, portions))
    reader = make(max_size=size, on_file=files.append, on_contents=contents.extend)
    try:
        for portion in portions:
            reader.feed(portion)
        return reader.finish(), files, bytes(contents)
    except Malformed:
        return None


def _decoder(name: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        decoder = decompressor(name)
        total = 0
        for piece in decoder.feed(data):
            assert len(piece) <= 1 << 20
            total += len(piece)
            if total > _MAX_DECODED:
                return
        decoder.finish()

    return _own_errors(run)


def _file(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        descriptor, name = tempfile.mkstemp()
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(data)
            read(Path(name))
        finally:
            os.unlink(name)

    return _own_errors(run)


def _statement(data: bytes) -> None:
    statement.Statement.parse(data)
    statement.check_own(data, store_dir="/nix/store")


def _signer_frames(data: bytes) -> None:
    """Torn anywhere, the frames are the same."""
    whole = list(wire.Frames().feed(data))
    torn = wire.Frames()
    assert [frame for byte in data for frame in torn.feed(bytes([byte]))] == whole
    for frame in whole:
        with suppress(Malformed):
            for tree in wire.decode_each(frame):
                if isinstance(tree, dict):
                    requests.parse(tree, store_dir="/nix/store")


def _range(data: bytes) -> None:
    header = data.decode("latin-1")
    for size in (0, 1, 1000):
        with suppress(Unsatisfiable):
            span = parse_range(header, size)
            assert span is None or 0 <= span.start < span.stop <= size
    etag_matches(header, '"x"')


def _trust(data: bytes) -> None:
    """What is loaded can be verified against, and signed with where it names services."""

    def read(file: Path) -> None:
        found = trust.load(file)
        Verifier(ByIdentity("a", "b"), found)
        if found.services is not None:
            Log(found, timeout=1)
            found.services.get_fulcio()

    _file(read)(data)


_OIDC_KEY = ed25519.Ed25519PrivateKey.generate()
_OIDC_JWK = jwt.PyJWK(
    json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(_OIDC_KEY.public_key())) | {"kid": "1"}
)
_OIDC_RULE = OidcConfig(
    issuer="https://i", audience="narseal", claims={"sub": "s"}, identity=None, allow=("*",)
)


def _oidc_token(data: bytes) -> None:
    """What anybody may send: whatever it names, nobody signed it."""
    text = data.decode("utf-8", "surrogateescape")
    oidc.claimed(text)
    assert oidc.held(text, _OIDC_RULE, _OIDC_JWK) is None


def _oidc_claims(data: bytes) -> None:
    """What a good issuer may sign, whatever its pipeline's users had it say."""
    text = jwt.PyJWS().encode(data, _OIDC_KEY, "EdDSA", headers={"kid": "1"})
    oidc.claimed(text)
    token = oidc.held(text, _OIDC_RULE, _OIDC_JWK)
    if token is not None:
        claims = json.loads(data)
        assert (claims["iss"], claims["sub"], token.allow) == ("https://i", "s", ("*",))
        assert token.expires == float(claims["exp"])


def _oidc_keys(data: bytes) -> None:
    tree = load_json(data, what="keys")
    if isinstance(tree, dict):
        oidc.keys_of(tree)


def _config(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    with suppress(NarsealError):
        Config.parse(text, environ={})
    SignerConfig.parse(text)


def _keys(text: str) -> None:
    for parse in (PublicKey.parse, SecretKey.parse, Signature.parse):
        with suppress(NarsealError):
            parse(text)


TARGETS: dict[str, Target] = {
    "narinfo": Target(_own_errors(_same_again), seeds.NARINFOS),
    "nar": Target(_own_errors(_nar), seeds.NARS),
    "realisation": Target(_own_errors(_realisation), seeds.REALISATIONS),
    "cache-info": Target(_text(CacheInfo.parse), seeds.CACHE_INFOS),
    "store-path": Target(_text(StorePath.parse), seeds.STORE_PATHS),
    "hash": Target(_text(Hash.parse), seeds.HASHES),
    "nix-keys": Target(_text(_keys), seeds.NIX_KEYS),
    "content-address": Target(_text(ContentAddress.parse), seeds.CONTENT_ADDRESSES),
    "signer": Target(_own_errors(_signer_frames), seeds.SIGNER),
    "bundle": Target(_own_errors(Bundle.parse), seeds.BUNDLES),
    "statement": Target(_own_errors(_statement), seeds.STATEMENTS),
    "cosign-public-key": Target(_text(CosignPublicKey.parse), seeds.COSIGN_PUBLIC_KEYS),
    "cosign-key": Target(_text(lambda text: CosignKey.parse(text, b"")), seeds.COSIGN_KEYS),
    "policy": Target(
        _own_errors(lambda data: cluster_image_policy.translate(data, globs=["*"])), seeds.POLICIES
    ),
    "tokens": Target(_file(tokens.listed), seeds.TOKENS),
    "config": Target(_own_errors(_config), seeds.CONFIGS),
    "trusted-root": Target(_trust, seeds.TRUST),
    "oidc-token": Target(_oidc_token, seeds.OIDC_TOKENS),
    "oidc-claims": Target(_oidc_claims, seeds.OIDC_CLAIMS),
    "oidc-keys": Target(_own_errors(_oidc_keys), seeds.OIDC_KEYS),
    "range": Target(_range, seeds.RANGES),
    **{
        name: Target(_decoder(name), (compressed,)) for name, compressed in seeds.COMPRESSED.items()
    },
}


def described(name: str, error: BaseException) -> str:
    """A finding in one line."""
    return json.dumps({"target": name, "error": f"{type(error).__name__}: {error}"[:300]})
