"""Good input of every kind, from which the fuzzers start."""

from __future__ import annotations

import base64
import json

from narseal.cosign import statement
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeySigner
from narseal.custody import wire
from narseal.nix import nar
from narseal.nix.content_address import ContentAddress, Method
from narseal.nix.hashes import Hash
from narseal.nix.realisation import BuildTraceEntry, Realisation
from tests.tools.cache import COMPRESS, entry, key, store_path, tree
from tests.tools.nar_reader import EVERYTHING
from tests.tools.trust import ROOT, client_config

_KEY = key("upstream-1")
_CA = ContentAddress(Method.NAR, Hash.sha256(b"x"))
ITEM = entry("item", b"x", compression="zstd", references=(store_path("dep"),)).signed(_KEY)
_OLD = Realisation(f"sha256:{'ab' * 32}!out", store_path("out"))
_NEW = BuildTraceEntry(store_path("x.drv"), "out", store_path("out"))
_COSIGN = CosignKey.generate()
_SIGNER = KeySigner(_COSIGN, None, timeout=1)
assert ITEM.info.file_hash
_STATEMENT = statement.render(
    [statement.AttestedPath(ITEM.info, ITEM.info.url.removeprefix("nar/"), ITEM.info.file_hash)]
)


def frame(**request: object) -> bytes:
    """A request to the signer, as it stands on the wire."""
    return wire.encode({"id": 1, **request})


NARINFOS = (
    ITEM.info.render(),
    entry("plain", compression="none", ca=_CA).signed(_KEY).info.render(),
)
NARS = tuple(
    b"".join(nar.render(node)) for node in (tree(b"contents"), nar.Symlink(b"x"), EVERYTHING)
)
REALISATIONS = (
    f"realisations/{_OLD.id}.doi\n".encode() + _OLD.render(),
    f"build-trace-v2/{_NEW.drv_path}/out.doi\n".encode() + _NEW.render(),
)
CACHE_INFOS = (b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n",)
STORE_PATHS = (str(store_path("x")).encode(), b"/nix/store/" + str(store_path("x")).encode())
HASHES = tuple(
    text.encode() for text in (str(Hash.sha256(b"")), Hash.sha256(b"").sri, f"sha256:{'ab' * 32}")
)
NIX_KEYS = (str(_KEY.public).encode(), _KEY.render().encode(), str(_KEY.sign(b"x")).encode())
CONTENT_ADDRESSES = (str(_CA).encode(), f"text:sha256:{'0' * 52}".encode(), b"fixed:git:sha1:0")
SIGNER = (
    frame(kind="path", key="operator-1", narinfo=ITEM.info.render().decode(), file=None),
    frame(kind="realisation", key="operator-1", name=f"realisations/{_OLD.id}.doi",
          body=_OLD.render().decode()),
    frame(kind="keys"),
    wire.encode_several(
        [{"id": 1, "kind": "keys"},
         {"id": 2, "kind": "path", "key": "operator-1", "file": None,
          "narinfo": ITEM.info.render(whole=False).decode()}]
    ),
)  # fmt: skip
BUNDLES = (_SIGNER.sign_digest(bytes(32)), _SIGNER.sign_statement(_STATEMENT))
STATEMENTS = (_STATEMENT,)
COSIGN_PUBLIC_KEYS = (_COSIGN.public.render().encode(),)
COSIGN_KEYS = (_COSIGN.render(b"").encode(),)
POLICIES = (
    (
        b"apiVersion: policy.sigstore.dev/v1beta1\nkind: ClusterImagePolicy\nmetadata: {name: x}\n"
        b"spec:\n  images: [{glob: '**'}]\n  authorities:\n  - name: a\n    keyless:\n"
        b"      identities: [{issuer: https://i, subject: s}]\n"
        b"    attestations: [{name: p, predicateType: slsaprovenance1}]\n"
    ),
)
TOKENS = (
    json.dumps({"id": "0" * 12, "name": "ci", "allow": ["*"], "expires": None, "hash": "$"}).encode(),
)  # fmt: skip
CONFIGS = (
    (
        b'listen = "127.0.0.1:0"\n[[upstream]]\nurl = "https://x"\npublic_keys = []\n'
        b'[limits]\nheader_timeout = "5s"\nnar_size = "1G"\n[[policy]]\nmatch = "*"\naction = "deny"\n'
    ),
    b'listen = "unix:/s"\nallow_users = ["0"]\n[[key]]\nurl = "file:/x"\n[audit]\nlog = "/l"\n',
)
TRUST = (ROOT.read_bytes(), client_config())
OIDC_CLAIMS = (
    b'{"iss":"https://i","aud":["narseal"],"sub":"s","iat":1,"nbf":1,"exp":4e9,"jti":"1"}',
    b'{"iss":"https://i","aud":"narseal","sub":"s","iat":1,"exp":1e999,"ref":{"a":[1,2.5,null]}}',
)
_JWT_HEAD = base64.urlsafe_b64encode(b'{"alg":"EdDSA","kid":"1","crit":["b64"]}').rstrip(b"=")
OIDC_TOKENS = tuple(
    b".".join((_JWT_HEAD, base64.urlsafe_b64encode(claims).rstrip(b"="), b"c2ln"))
    for claims in OIDC_CLAIMS
)
OIDC_KEYS = (
    (
        b'{"keys":[{"kty":"RSA","alg":"RS256","kid":"1","n":"sXch","e":"AQAB"},{"kty":"OKP",'
        b'"crv":"Ed25519","kid":"2","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}'
    ),
    (
        b'{"keys":[{"kty":"EC","crv":"P-256","kid":"1","use":"sig",'
        b'"x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",'
        b'"y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"},{"kty":"oct","k":"AAAA"}]}'
    ),
)
RANGES = (b"bytes=0-1", b"bytes=-5", b'W/"x", *')
COMPRESSED = {name: compress(b"some text " * 20) for name, compress in COMPRESS.items()
              if name in ("xz", "zstd", "bzip2", "gzip", "br", "lzma")}  # fmt: skip
