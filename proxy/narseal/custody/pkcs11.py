"""Keys in a hardware token: `pkcs11:token=…;object=…?module-path=…&pin-source=…&key=NAME` (RFC 7512).

Ed25519 for substituter keys, ECDSA P-256 for cosign's. The private half never leaves the token;
the public one is read from it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
#: What a URL may say of its token beside its label, and how the library calls it.
_OF_TOKENS = {"serial": "serial", "manufacturer": "manufacturer_id", "model": "model"}
_QUERY = {"module-path", "pin-source", "key"}
_PROBE = 60
_HASH = 32  # bytes
_TRIED = hashlib.sha256(b"narseal tries a key of a token").digest()


@dataclass(frozen=True, slots=True)
class TokenUrl:
    """Which key of which token, and with which module and PIN file."""

    token: str
    #: What else the token must have: the library's names, and values.
    described: tuple[tuple[str, str], ...]
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
            tuple(
                (attribute, unquote(path[name]))
                for name, attribute in _OF_TOKENS.items()
                if name in path
            ),
            unquote(path["object"]) if "object" in path else None,
            unquote_to_bytes(path["id"]) if "id" in path else None,
            unquote(query["module-path"]),
            unquote(pin).removeprefix("file:") if pin else None,
            unquote(query.get("key") or path.get("object") or ""),
        )

    def __str__(self) -> str:
        described = "".join(f";{name}={value}" for name, value in self.described)
        return f"pkcs11:token={self.token}{described};object={self.label or self.name}"


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
        #: Those of tokens, by label and serial number; and which token a URL means.
        self._sessions: dict[tuple[str, str], Any] = {}
        self._tokens: dict[tuple[object, ...], tuple[str, str]] = {}
        self._keys: dict[tuple[object, ...], Any] = {}

    def work(self, url: TokenUrl, which: dict[str, Any], work: Callable[[Any], bytes]) -> bytes:
        """Do something with a key; once more from the beginning if that fails."""
        with self._lock:
            try:
                return work(self._key(url, which))
            except (pkcs11.PinIncorrect, pkcs11.PinLocked):
                raise
            except pkcs11.PKCS11Error:
                self._begin_anew()
                return work(self._key(url, which))

    def _key(self, url: TokenUrl, which: dict[str, Any]) -> Any:
        name = (url.token, url.described, *which.items())
        if name not in self._keys:
            self._keys[name] = self._session(url).get_key(**which)
        return self._keys[name]

    def _session(self, url: TokenUrl) -> Any:
        named = (url.token, url.described)
        if named not in self._tokens:
            token = self._token(url)
            which = token.label, _text(token.serial)
            if which not in self._sessions:  # one login, whatever URLs call it
                self._sessions[which] = self._log_in(url, token, which)
            self._tokens[named] = which
        return self._sessions[self._tokens[named]]

    def _log_in(self, url: TokenUrl, token: Any, which: tuple[str, str]) -> Any:
        if not url.pin_file:
            return token.open()
        pin = read_private(Path(expand(url.pin_file))).strip()
        with _REFUSED.held(self._path, *which) as refused:
            if refused.has(self._path, *which, pin):
                raise pkcs11.PinIncorrect(
                    f"the PIN in {url.pin_file} was refused; correct it, or restart if the token's"
                    " PIN was changed"
                )
            try:
                return token.open(user_pin=pin)
            except pkcs11.PinIncorrect:
                refused.add(self._path, *which, pin)
                raise

    def _token(self, url: TokenUrl) -> Any:
        library = pkcs11.lib(self._path)
        if not url.described:
            return library.get_token(token_label=url.token)
        for slot in library.get_slots(token_present=True):
            token = slot.get_token()
            said = [(name, _text(getattr(token, name))) for name, _ in url.described]
            if token.label == url.token and said == list(url.described):
                return token
        what = ", ".join(f"{name} {value}" for name, value in url.described)
        raise pkcs11.NoSuchToken(f"no token {url.token} has {what}")

    def _begin_anew(self) -> None:
        """Whoever has a key of this module finds it again."""
        self._sessions.clear()
        self._tokens.clear()
        self._keys.clear()
        pkcs11.lib(self._path).reinitialize()


class _RefusedPins:
    """PINs that a token refused, in memory that all processes share: each of them would present it once.

    Made before workers are forked, as what looks at a configuration imports this; `_probe` passes it on.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("refused PINs")
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_APPEND)
        os.write(self.descriptor, secrets.token_bytes(_HASH))  # salt

    def take(self, descriptor: int) -> None:
        """Go on with another process's."""
        os.close(self.descriptor)
        self.descriptor = descriptor

    @contextmanager
    def held(self, *token: str) -> Iterator[_RefusedPins]:
        """One process at a time logs into a token; a token that hangs holds up no other."""
        place = int.from_bytes(self._named(token)[:4])  # of a lock, which need not be in the file
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, place)
        try:
            yield self
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, place)

    def has(self, *what: str) -> bool:
        """Whether the module's token refused the PIN."""
        known = self._known()
        return self._named(what) in (known[n : n + _HASH] for n in range(0, len(known), _HASH))

    def add(self, *what: str) -> None:
        """It did just now."""
        os.write(self.descriptor, self._named(what))

    def _known(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def _named(self, what: tuple[str, ...]) -> bytes:
        salt = os.pread(self.descriptor, _HASH, 0)
        return hashlib.sha256(b"\0".join([salt, *(text.encode() for text in what)])).digest()


_REFUSED = _RefusedPins()
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
        self._url = where
        self._token = Token(where, KeyType.EC_EDWARDS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkcs11")

    async def sign(self, request: Request) -> Signature:
        """The token's signature; Unavailable if it is away."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.sign_message, request.message)

    def sign_message(self, message: bytes) -> Signature:
        """The same over a message of narseal's own making. Blocks.

        Nothing else is given out than what `public` verifies: the token may have another key by now.
        """
        made = Signature(self.public.name, self._token.sign(message, Mechanism.EDDSA))
        if not self.public.verifies(message, made):
            raise Unavailable(_another_key(self._url))
        return made

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
            self.public = _cosign_key(_probe(url, "cosign"))
        except ValueError as error:
            raise ConfigError(f"{url}: not an ECDSA P-256 key: {error}") from error
        self._url = TokenUrl.parse(url)
        self._token = Token(self._url, KeyType.EC)

    def sign_digest(self, digest: bytes) -> bytes:
        """The DER signature over a SHA-256 digest; Unavailable if the token is away."""
        made = _der(self._token.sign(digest, Mechanism.ECDSA))
        if not self.public.verifies(digest, made):
            raise Unavailable(_another_key(self._url))
        return made

    def sign_statement(self, statement: bytes) -> bytes:
        """The signature over a statement in its DSSE envelope."""
        return self.sign_digest(envelope_digest(statement))


def _another_key(url: TokenUrl) -> str:
    return (
        f"{url}: the public key that it had at the start does not verify what the token signs; if"
        " it has another key now, give that one a name of its own and restart"
    )


def _text(value: object) -> str:
    """What a token says of itself, without the blanks that fill it."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.rstrip(" \0")


def _cosign_key(point: bytes) -> CosignPublicKey:
    """ValueError if it is no point of P-256."""
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point[-65:])
    form = PublicFormat.SubjectPublicKeyInfo
    return CosignPublicKey(key.public_bytes(Encoding.DER, form))


def _der(raw: bytes) -> bytes:
    half = len(raw) // 2
    return encode_dss_signature(
        int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
    )


def _probe(url: str, kind: str) -> bytes:
    """Read the public half in a process of its own: a module does not outlive a fork."""
    TokenUrl.parse(url)
    shared = _REFUSED.descriptor
    command = [sys.executable, "-m", "narseal.custody.pkcs11", kind, str(shared)]
    try:
        done = subprocess.run(
            command, input=url, capture_output=True, text=True, timeout=_PROBE, check=False,
            pass_fds=(shared,),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{url}: the token does not answer for {_PROBE} s") from error
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
    _REFUSED.take(int(sys.argv[2]))
    try:
        sys.stdout.write(json.dumps({"point": _tried(kind, TokenUrl.parse(url)).hex()}))
    except (ConfigError, Unavailable) as error:
        sys.stdout.write(json.dumps({"error": str(error)}))


def _tried(kind: str, url: TokenUrl) -> bytes:
    """The public half, which verifies what the token signs; ConfigError if it does not."""
    if kind == "ed25519":
        token = Token(url, KeyType.EC_EDWARDS)
        point = token.public_point()
        made = Signature("tried-1", token.sign(_TRIED, Mechanism.EDDSA))
        is_pair = PublicKey("tried-1", point[-32:]).verifies(_TRIED, made)
    else:
        token = Token(url, KeyType.EC)
        point = token.public_point()
        made_der = _der(token.sign(_TRIED, Mechanism.ECDSA))
        try:
            is_pair = _cosign_key(point).verifies(_TRIED, made_der)
        except ValueError:  # whoever asked says what it is
            is_pair = True
    if not is_pair:
        raise ConfigError(
            f"{url}: the token's private key is not that of its public key of this name or id:"
            " remove the one that does not belong there"
        )
    return point


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
