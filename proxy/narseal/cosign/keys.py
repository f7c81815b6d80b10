"""Cosign's key pairs: ECDSA P-256, the private key encrypted with a password.

Format: `pkg/cosign/keys.go` of sigstore/cosign and `encrypted.go` of go-securesystemslib: PEM of
a JSON document that names scrypt, nacl/secretbox and their parameters, over PKCS#8 DER.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_pem_public_key,
)
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from narseal.cosign.statement import envelope_digest
from narseal.errors import MalformedKey

_LABEL = "ENCRYPTED SIGSTORE PRIVATE KEY"
_OLD_LABEL = "ENCRYPTED COSIGN PRIVATE KEY"
_N, _R, _P = 65536, 8, 1
# less is no protection; more would let a key file take the machine's memory and time
_LEAST_N, _MOST_MEMORY, _MOST_P = 16384, 128 << 20, 4
_MAX_BYTES = 64 << 10
_PREHASHED = ec.ECDSA(Prehashed(hashes.SHA256()))


@dataclass(frozen=True)
class CosignPublicKey:
    """A `cosign.pub`."""

    der: bytes

    @classmethod
    def parse(cls, pem: str) -> CosignPublicKey:
        """A PEM public key; MalformedKey if it is none, or not ECDSA P-256."""
        try:
            key = load_pem_public_key(pem.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise MalformedKey(f"not a PEM public key like cosign.pub: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise MalformedKey(
                "not an ECDSA P-256 key, which is what cosign generate-key-pair makes"
            )
        return cls(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))

    def render(self) -> str:
        """PEM, as in cosign.pub."""
        return _pem("PUBLIC KEY", self.der)

    @cached_property
    def hint(self) -> str:
        """How a bundle names the key: base64 of the SHA-256 of its DER."""
        return base64.b64encode(hashlib.sha256(self.der).digest()).decode()

    def verifies(self, digest: bytes, signature: bytes) -> bool:
        """Whether `signature` (DER) is over a SHA-256 digest."""
        try:
            self._key.verify(signature, digest, _PREHASHED)
        except InvalidSignature:
            return False
        return True

    @cached_property
    def _key(self) -> ec.EllipticCurvePublicKey:
        key = load_pem_public_key(self.render().encode())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key


class CosignKey:
    """A private key, decrypted."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        form = PublicFormat.SubjectPublicKeyInfo
        self.public = CosignPublicKey(key.public_key().public_bytes(Encoding.DER, form))

    @classmethod
    def generate(cls) -> CosignKey:
        """A new key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def parse(cls, pem: str, password: bytes) -> CosignKey:
        """Decrypt a `cosign.key` of either label.

        MalformedKey says what is wrong: the form, a parameter, the password, the kind of key.
        """
        document = _document(pem)
        box = SecretBox(_derived(document["kdf"], password))
        cipher = document["cipher"]
        if cipher.get("name") != "nacl/secretbox":
            raise MalformedKey(f"cipher {str(cipher.get('name'))[:40]!r} is not nacl/secretbox")
        try:
            der = box.decrypt(_bytes(document["ciphertext"]), _bytes(cipher.get("nonce")))
        except (CryptoError, ValueError) as error:
            raise MalformedKey("the password is wrong, or the key file is damaged") from error
        try:
            key = load_der_private_key(der, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise MalformedKey(f"no PKCS#8 key inside: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise MalformedKey(
                "not an ECDSA P-256 key, which is what cosign generate-key-pair makes"
            )
        return cls(key)

    def render(self, password: bytes) -> str:
        """Encrypted PEM, as `cosign generate-key-pair` writes it."""
        der = self._key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        salt, nonce = os.urandom(32), os.urandom(SecretBox.NONCE_SIZE)
        kdf = {
            "name": "scrypt",
            "params": {"N": _N, "r": _R, "p": _P},
            "salt": base64.b64encode(salt).decode(),
        }
        box = SecretBox(_derived(kdf, password))
        document = {
            "kdf": kdf,
            "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
            "ciphertext": base64.b64encode(box.encrypt(der, nonce).ciphertext).decode(),
        }
        return _pem(_LABEL, json.dumps(document, separators=(",", ":")).encode())

    def sign_digest(self, digest: bytes) -> bytes:
        """The DER signature over a SHA-256 digest."""
        return self._key.sign(digest, _PREHASHED)

    def sign_statement(self, statement: bytes) -> bytes:
        """The DER signature over a statement in its DSSE envelope."""
        return self.sign_digest(envelope_digest(statement))


def _document(pem: str) -> dict[str, Any]:
    """The JSON inside the PEM, of the right shape."""
    lines = [line.strip() for line in pem[: _MAX_BYTES + 1].strip().splitlines()]
    label = lines[0].removeprefix("-----BEGIN ").removesuffix("-----") if lines else ""
    if len(pem) > _MAX_BYTES or label not in (_LABEL, _OLD_LABEL) or len(lines) < 3:
        raise MalformedKey(f"not a cosign key: it must begin with -----BEGIN {_LABEL}-----")
    if lines[-1] != f"-----END {label}-----":
        raise MalformedKey("the key file is cut off: its END line is missing")
    try:
        document = json.loads(base64.b64decode("".join(lines[1:-1]), validate=True))
    except (ValueError, RecursionError) as error:
        raise MalformedKey(f"the key file is damaged: {error}") from error
    if not isinstance(document, dict) or not all(
        isinstance(document.get(name), kind)
        for name, kind in (("kdf", dict), ("cipher", dict), ("ciphertext", str))
    ):
        raise MalformedKey("the key file has not the fields kdf, cipher and ciphertext")
    return document


def _derived(kdf: dict[str, Any], password: bytes) -> bytes:
    """The symmetric key; bounded, whatever the file says."""
    if kdf.get("name") != "scrypt":
        raise MalformedKey(f"kdf {str(kdf.get('name'))[:40]!r} is not scrypt")
    params = kdf.get("params")
    n, r, p = (_positive(params, name) for name in ("N", "r", "p"))
    too_little = n < _LEAST_N or n & (n - 1)
    if too_little or 128 * n * r > _MOST_MEMORY or p > _MOST_P:
        raise MalformedKey(
            f"scrypt with N={n}, r={r}, p={p} is out of bounds; cosign itself writes N={_N}, r={_R},"
            f" p={_P}"
        )
    salt = _bytes(kdf.get("salt"))
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, dklen=32, maxmem=2 * _MOST_MEMORY)


def _positive(params: object, name: str) -> int:
    value = params.get(name) if isinstance(params, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MalformedKey(f"scrypt's parameter {name} is missing, or no positive number")
    return value


def _bytes(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except ValueError as error:  # characters beyond ASCII are no binascii.Error
        raise MalformedKey(f"the key file is damaged: {error}") from error


def _pem(label: str, data: bytes) -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(data).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"
