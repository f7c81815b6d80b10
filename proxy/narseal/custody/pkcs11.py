"""Keys in a hardware token: `pkcs11:token=…;object=…?module-path=…&pin-source=…&key=NAME` (RFC 7512).

Ed25519 for substituter keys, ECDSA P-256 for cosign's. The private half never leaves the token;
the public one is read from it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import pkcs11
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.statement import envelope_digest
from narseal.custody.file import expand, read_private
from narseal.custody.requests import Request
from narseal.errors import ConfigError, MalformedKey, Unavailable
from narseal.nix.keys import PublicKey, Signature, check_key_name

_PATH = {"token", "object", "id", "serial", "manufacturer", "model"}
_QUERY = {"module-path", "pin-source", "key"}
_PROBE = 60


@dataclass(frozen=True, slots=True)
class TokenUrl:
    """Which key of which token, and with which module and PIN file."""

    token: str
    label: str | None
    id: bytes | None
    module: str
    pin_file: str | None
    name: str

    @classmethod
    def parse(cls, url: str) -> TokenUrl:
        """ConfigError says what is missing, or not known."""
        parts = urlsplit(url)
        path = _attributes(url, parts.path, ";", _PATH)
        query = _attributes(url, parts.query, "&", _QUERY)
        for name, found in (("token", path), ("module-path", query)):
            if name not in found:
                raise ConfigError(f"{url}: {name} is missing")
        if "object" not in path and "id" not in path:
            raise ConfigError(f"{url}: object or id says which key")
        pin = query.get("pin-source")
        return cls(
            unquote(path["token"]),
            unquote(path["object"]) if "object" in path else None,
            unquote_to_bytes(path["id"]) if "id" in path else None,
            unquote(query["module-path"]),
            unquote(pin).removeprefix("file:") if pin else None,
            unquote(query.get("key") or path.get("object") or ""),
        )

    def __str__(self) -> str:
        return f"pkcs11:token={self.token};object={self.label or self.name}"


class Token:
    """One key of a token. Its methods block."""

    def __init__(self, url: TokenUrl, key_type: KeyType) -> None:
        self._url = url
        self._module = _module(url.module)
        self._which: dict[str, Any] = {"key_type": key_type}
        if url.label is not None:
            self._which["label"] = url.label
        if url.id is not None:
            self._which["id"] = url.id

    def sign(self, data: bytes, mechanism: Mechanism) -> bytes:
        """The raw signature; Unavailable if the token cannot be used."""
        return self._work(
            ObjectClass.PRIVATE_KEY, lambda key: bytes(key.sign(data, mechanism=mechanism))
        )

    def public_point(self) -> bytes:
        """The public key as the token has it: the bytes of the EC point."""
        return self._work(ObjectClass.PUBLIC_KEY, lambda key: bytes(key[Attribute.EC_POINT]))

    def _work(self, kind: ObjectClass, work: Callable[[Any], bytes]) -> bytes:
        try:
            return self._module.work(self._url, {"object_class": kind, **self._which}, work)
        except ConfigError as error:  # its PIN file
            raise Unavailable(f"{self._url}: {error}") from error
        except (pkcs11.PKCS11Error, RuntimeError) as error:
            what = type(error).__name__ + (f" {error}" if str(error) else "")
            raise Unavailable(f"{self._url}: the token cannot be used: {what}") from error


class _Module:
    """A PKCS#11 module of this process: one login for each token, made anew when it was away.

    A PIN that the token refused is not presented again: a few refusals lock a token for good.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._sessions: dict[str, Any] = {}
        self._keys: dict[tuple[object, ...], Any] = {}
        self._refused: dict[str, str] = {}

    def work(self, url: TokenUrl, which: dict[str, Any], work: Callable[[Any], bytes]) -> bytes:
        """Do something with a key; once more from the beginning if that fails."""
        with self._lock:
            try:
                return work(self._key(url, which))
            except pkcs11.PinIncorrect:
                raise
            except pkcs11.PKCS11Error:
                self._begin_anew()
                return work(self._key(url, which))

    def _key(self, url: TokenUrl, which: dict[str, Any]) -> Any:
        name = (url.token, *which.items())
        if name not in self._keys:
            self._keys[name] = self._session(url).get_key(**which)
        return self._keys[name]

    def _session(self, url: TokenUrl) -> Any:
        if url.token not in self._sessions:
            pin = read_private(Path(expand(url.pin_file))).strip() if url.pin_file else None
            self._sessions[url.token] = self._log_in(url, pin)
        return self._sessions[url.token]

    def _log_in(self, url: TokenUrl, pin: str | None) -> Any:
        if not pin:
            return pkcs11.lib(self._path).get_token(token_label=url.token).open()
        if self._refused.get(url.token) == pin:
            raise pkcs11.PinIncorrect(f"the PIN in {url.pin_file} was refused; correct it")
        try:
            return pkcs11.lib(self._path).get_token(token_label=url.token).open(user_pin=pin)
        except pkcs11.PinIncorrect:
            self._refused[url.token] = pin
            raise

    def _begin_anew(self) -> None:
        """Whoever has a key of this module finds it again."""
        self._sessions.clear()
        self._keys.clear()
        pkcs11.lib(self._path).reinitialize()


_MODULES: dict[str, _Module] = {}


def _module(path: str) -> _Module:
    """A module is loaded and logged into once a process, whoever uses it."""
    return _MODULES.setdefault(path, _Module(path))


class Pkcs11Key:
    """A substituter key in a token."""

    def __init__(self, url: str) -> None:
        """ConfigError if the token or its public key cannot be read. Blocks."""
        where = TokenUrl.parse(url)
        try:
            self.public = PublicKey(check_key_name(where.name), _probe(url, "ed25519")[-32:])
        except MalformedKey as error:
            raise ConfigError(f"{url}: {error}; give the key's name as key=NAME") from error
        self._token = Token(where, KeyType.EC_EDWARDS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkcs11")

    async def sign(self, request: Request) -> Signature:
        """The token's signature; Unavailable if it is away."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.sign_message, request.message)

    def sign_message(self, message: bytes) -> Signature:
        """The same over a message of narseal's own making. Blocks."""
        return Signature(self.public.name, self._token.sign(message, Mechanism.EDDSA))

    async def note(self, kind: str, name: str, reason: str) -> None:
        """There is no audit log: the index says what is revoked."""

    def close(self) -> None:
        """Sign no more; the token's session is the process's."""
        self._thread.shutdown()


class Pkcs11CosignKey:
    """A cosign key in a token. Its methods block."""

    def __init__(self, url: str) -> None:
        """ConfigError if the token or its public key cannot be read."""
        try:
            point = ec.EllipticCurvePublicKey.from_encoded_point(
                ec.SECP256R1(), _probe(url, "cosign")[-65:]
            )
        except ValueError as error:
            raise ConfigError(f"{url}: not an ECDSA P-256 key: {error}") from error
        form = PublicFormat.SubjectPublicKeyInfo
        self.public = CosignPublicKey(point.public_bytes(Encoding.DER, form))
        self._token = Token(TokenUrl.parse(url), KeyType.EC)

    def sign_digest(self, digest: bytes) -> bytes:
        """The DER signature over a SHA-256 digest; Unavailable if the token is away."""
        raw = self._token.sign(digest, Mechanism.ECDSA)
        half = len(raw) // 2
        return encode_dss_signature(
            int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
        )

    def sign_statement(self, statement: bytes) -> bytes:
        """The signature over a statement in its DSSE envelope."""
        return self.sign_digest(envelope_digest(statement))


def _probe(url: str, kind: str) -> bytes:
    """Read the public half in a process of its own: a module does not outlive a fork."""
    TokenUrl.parse(url)
    command = [sys.executable, "-m", "narseal.custody.pkcs11", kind]
    done = subprocess.run(
        command, input=url, capture_output=True, text=True, timeout=_PROBE, check=False
    )
    try:
        answer = json.loads(done.stdout)
        if "point" in answer:
            return bytes.fromhex(answer["point"])
        raise ConfigError(str(answer["error"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{url}: the token cannot be asked: {done.stderr[-300:]}") from error


def main() -> None:
    """The process of `_probe`: the URL comes on standard input."""
    kind, url = sys.argv[1], sys.stdin.read(8192)
    key_type = KeyType.EC_EDWARDS if kind == "ed25519" else KeyType.EC
    try:
        point = Token(TokenUrl.parse(url), key_type).public_point()
        sys.stdout.write(json.dumps({"point": point.hex()}))
    except (ConfigError, Unavailable) as error:
        sys.stdout.write(json.dumps({"error": str(error)}))


def _attributes(url: str, text: str, separator: str, known: set[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, text.split(separator)):
        name, equals, value = part.partition("=")
        if not equals or name not in known or name in found:
            hint = "; a PIN is in a file: pin-source=file:/path" if name == "pin-value" else ""
            raise ConfigError(
                f"{url.partition('?')[0]}: {name!r} is not known here, or twice{hint}"
            )
        found[name] = value
    return found


if __name__ == "__main__":
    main()
