"""A small OIDC issuer: discovery, JWKS, RS256 tokens, and the client-credentials grant.

At its own address it vouches for e-mail addresses; below `/KIND` it is an issuer of each other kind.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.tools.sigstore.identities import KINDS

CLIENT, SECRET = "narseal-ci", "not really"


class Issuer:
    """Runs in a thread of this process until closed."""

    def __init__(self) -> None:
        self._kid = 0
        self.rotate()
        self.identity = "ci@example.org"
        #: Seconds that tokens of the token endpoint are good for.
        self.lifetime = 600.0
        self.granted = 0
        self.ambient = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def token(self, identity: str | None = None, *, lifetime: float = 600, **claims: Any) -> str:
        """A signed identity token."""
        now = time.time()
        body = {
            "iss": self.url,
            "aud": "sigstore",
            "sub": identity or self.identity,
            "email": identity or self.identity,
            "email_verified": True,
            "iat": int(now),
            "exp": int(now + lifetime),
        }
        return jwt.encode(body | claims, self._key, "RS256", headers={"kid": str(self._kid)})

    def url_of(self, kind: str) -> str:
        """Where the issuer of a kind of tokens is."""
        return f"{self.url}/{kind}"

    def token_of(self, kind: str, *, lifetime: float = 600, **claims: Any) -> str:
        """A token as that kind of issuer gives it."""
        now = int(time.time())
        body = {"iss": self.url_of(kind), "aud": "sigstore", "iat": now, "nbf": now}
        body |= {"exp": int(now + lifetime)} | KINDS[kind].claims | claims
        return jwt.encode(body, self._key, "RS256", headers={"kid": str(self._kid)})

    def rotate(self) -> None:
        """Another key, and only that."""
        self._key = rsa.generate_private_key(65537, 2048)
        self._kid += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _discovery(self, issuer: str) -> dict[str, Any]:
        return {
            "issuer": issuer,
            "authorization_endpoint": f"{self.url}/auth",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
        }

    def _keys(self) -> dict[str, Any]:
        numbers = self._key.public_key().public_numbers()
        fields = {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": str(self._kid)}
        return {"keys": [fields | {"n": _base64url(numbers.n), "e": _base64url(numbers.e)}]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, tree: object, status: int = 200) -> None:
                body = json.dumps(tree).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                place = self.path.removesuffix("/.well-known/openid-configuration")
                if place != self.path:
                    self._answer(issuer._discovery(issuer.url + place))
                elif self.path == "/keys":
                    self._answer(issuer._keys())
                elif self.path.startswith("/ambient"):  # as GitHub Actions answers
                    issuer.ambient += 1
                    good = self.headers["Authorization"] == "bearer runner"
                    self._answer({"value": issuer.token()} if good else {}, 200 if good else 401)
                else:
                    self._answer({}, 404)

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                form = parse_qs(self.rfile.read(size).decode())
                basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
                if (
                    self.path != "/token"
                    or form.get("grant_type") != ["client_credentials"]
                    or self.headers["Authorization"] != f"Basic {basic}"
                ):
                    self._answer({"error": "invalid_client"}, 401)
                    return
                issuer.granted += 1
                token = issuer.token(lifetime=issuer.lifetime)
                self._answer({"access_token": token, "id_token": token, "token_type": "Bearer"})

        return Handler


def _base64url(number: int) -> str:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
