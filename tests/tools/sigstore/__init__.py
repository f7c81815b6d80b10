"""A private Sigstore instance of the real services: Fulcio, Rekor v2, timestamps, CT log, OIDC."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.tools.debian import scratch
from tests.tools.ports import free_ports
from tests.tools.sigstore.build import program
from tests.tools.sigstore.front import Front
from tests.tools.sigstore.identities import KINDS, fulcio_config
from tests.tools.sigstore.issuer import Issuer
from tests.tools.waiting import until

_Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


class Service:
    """One of the real services: it can be killed, frozen and started again."""

    def __init__(self, name: str, port: int, argv: list[str], log: Path) -> None:
        self.name = name
        self.port = port
        self.url = f"http://localhost:{port}"
        self._argv = argv
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(program(self.name)), *self._argv], stdout=log, stderr=log,
                cwd=self._log.parent,
            )  # fmt: skip

    def wait(self) -> None:
        """Until it takes connections."""

        def answers() -> bool:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return True
            gone = self._process is None or self._process.poll() is not None
            assert not gone, f"{self.name} does not start:\n{self._log.read_text()[-2000:]}"
            return False

        until(answers, self.name)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class Sigstore:
    """The running services, and the files with which clients trust them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.issuer = Issuer()
        ca_key, ca = _authority("fulcio")
        _write_pem(folder / "ca.pem", ca)
        _write_key(folder / "ca.key", ca_key, password=b"ca")
        ct_key = ec.generate_private_key(ec.SECP256R1())
        _write_key(folder / "ct.key", ct_key, sec1=True)
        _write_public(folder / "ct.pub", ct_key)
        tsa_root_key, tsa_root = _authority("timestamps")
        tsa_key, tsa = _timestamp_signer(tsa_root_key, tsa_root)
        _write_key(folder / "tsa.key", tsa_key)
        _write_pem(folder / "tsa.pem", tsa, tsa_root)
        rekor_key = ed25519.Ed25519PrivateKey.generate()
        _write_key(folder / "rekor.key", rekor_key)
        urls = {kind: self.issuer.url_of(kind) for kind in KINDS}
        config = fulcio_config(urls)
        config["OIDCIssuers"] |= fulcio_config({"email": self.issuer.url})["OIDCIssuers"]
        (folder / "fulcio.json").write_text(json.dumps(config))
        ports = iter(free_ports(8))
        ct_port = next(ports)
        self.ct_log = Service(
            "tesseract",
            ct_port,
            [f"--http_endpoint=127.0.0.1:{ct_port}", "--origin=localhost",
             f"--storage_dir={folder}/ct", f"--private_key={folder}/ct.key",
             f"--roots_pem_file={folder}/ca.pem", "--checkpoint_interval=1s",
             "--batch_max_age=100ms"],
            folder / "ct.log",
        )  # fmt: skip
        fulcio_port = next(ports)
        self.fulcio = Service(
            "fulcio",
            fulcio_port,
            ["serve", "--host=127.0.0.1", f"--port={fulcio_port}", "--grpc-host=127.0.0.1",
             f"--grpc-port={next(ports)}", f"--metrics-port={next(ports)}", "--ca=fileca",
             f"--fileca-cert={folder}/ca.pem", f"--fileca-key={folder}/ca.key",
             "--fileca-key-passwd=ca", "--fileca-watch=false", f"--config-path={folder}/fulcio.json",
             f"--ct-log-url={self.ct_log.url}", f"--ct-log-public-key-path={folder}/ct.pub",
             f"--legacy-unix-domain-socket=@narseal-{os.getpid()}-{fulcio_port}"],
            folder / "fulcio.log",
        )  # fmt: skip
        rekor_port = next(ports)
        self.rekor = Service(
            "rekor",
            rekor_port,
            ["serve", "--http-address=127.0.0.1", f"--http-port={rekor_port}",
             f"--grpc-port={next(ports)}", f"--http-metrics-port={next(ports)}",
             f"--storage-dir={folder}/rekor", f"--signer-filepath={folder}/rekor.key",
             "--hostname=localhost", "--checkpoint-interval=1s", "--batch-max-age=100ms"],
            folder / "rekor.log",
        )  # fmt: skip
        self.log = Front(rekor_port, folder / "rekor")
        tsa_port = next(ports)
        self.tsa = Service(
            "timestamp",
            tsa_port,
            [f"--port={tsa_port}", f"--key={folder}/tsa.key", f"--chain={folder}/tsa.pem"],
            folder / "tsa.log",
        )  # fmt: skip
        self.services = [self.ct_log, self.fulcio, self.rekor, self.tsa]
        self.trusted_root: dict[str, Any] = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [_log(self.log.url, rekor_key, "localhost")],
            "certificateAuthorities": [_trusted_authority(self.fulcio.url, ca)],
            "ctlogs": [_log(self.ct_log.url, ct_key, None)],
            "timestampAuthorities": [_trusted_authority(self.tsa.url, tsa, tsa_root)],
        }
        self.signing_config: dict[str, Any] = {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [_service(self.fulcio.url, 1)],
            "oidcUrls": [_service(self.issuer.url, 1)],
            "rekorTlogUrls": [_service(self.log.url, 2)],
            "tsaUrls": [_service(f"{self.tsa.url}/api/v1/timestamp", 1)],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaConfig": {"selector": "ANY"},
        }
        self.trust_config_file = folder / "trust_config.json"
        self.trust_config_file.write_text(
            json.dumps(
                {
                    "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                    "trustedRoot": self.trusted_root,
                    "signingConfig": self.signing_config,
                }
            )
        )
        self.trusted_root_file = folder / "trusted_root.json"
        self.trusted_root_file.write_text(json.dumps(self.trusted_root))
        self.signing_config_file = folder / "signing_config.json"
        self.signing_config_file.write_text(json.dumps(self.signing_config))

    def start(self) -> None:
        for service in self.services:
            service.start()
            service.wait()

    def entries(self) -> int:
        """How many entries the transparency log has, as its checkpoint says."""
        return int((self.folder / "rekor/checkpoint").read_text().splitlines()[1])

    def close(self) -> None:
        for service in self.services:
            service.kill()
        self.log.close()
        self.issuer.close()


@contextmanager
def sigstore() -> Iterator[Sigstore]:
    """A running instance in a folder that the Debian root sees too."""
    with tempfile.TemporaryDirectory(prefix="sigstore-", dir=scratch()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        instance = Sigstore(folder)
        try:
            instance.start()
            yield instance
        finally:
            instance.close()


def _authority(name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "narseal tests"),
         x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )  # fmt: skip
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(subject, subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _timestamp_signer(
    root_key: ec.EllipticCurvePrivateKey, root: x509.Certificate
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "timestamp signer")])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    stamping = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    theirs = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    certificate = (
        _builder(subject, root.subject, key.public_key())
        .add_extension(usage, critical=True)
        .add_extension(stamping, critical=True)
        .add_extension(own, critical=False)
        .add_extension(theirs, critical=False)
        .sign(root_key, hashes.SHA256())
    )
    return key, certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
    )


def _write_key(file: Path, key: _Private, *, password: bytes = b"", sec1: bool = False) -> None:
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    form = (
        serialization.PrivateFormat.TraditionalOpenSSL
        if sec1
        else serialization.PrivateFormat.PKCS8
    )
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, encryption))


def _write_public(file: Path, key: _Private) -> None:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    file.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


def _write_pem(file: Path, *certificates: x509.Certificate) -> None:
    file.write_bytes(b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates))


def _der(key: _Private) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


def _log(url: str, key: _Private, origin: str | None) -> dict[str, Any]:
    """A transparency log of the trusted root; Rekor v2's id covers its origin."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        raw = key.public_key().public_bytes_raw()
        log_id = hashlib.sha256(f"{origin}\n".encode() + b"\x01" + raw).digest()
        details = "PKIX_ED25519"
    else:
        log_id = hashlib.sha256(_der(key)).digest()
        details = "PKIX_ECDSA_P256_SHA_256"
    return {
        "baseUrl": url,
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": base64.b64encode(_der(key)).decode(),
            "keyDetails": details,
            "validFor": {"start": _LONG_AGO.isoformat().replace("+00:00", "Z")},
        },
        "logId": {"keyId": base64.b64encode(log_id).decode()},
    }


def _trusted_authority(url: str, *chain: x509.Certificate) -> dict[str, Any]:
    return {
        "subject": {"organization": "narseal tests", "commonName": "authority"},
        "uri": url,
        "certChain": {
            "certificates": [
                {"rawBytes": base64.b64encode(c.public_bytes(serialization.Encoding.DER)).decode()}
                for c in chain
            ]
        },
        "validFor": {"start": _LONG_AGO.isoformat().replace("+00:00", "Z")},
    }


def _service(url: str, version: int) -> dict[str, Any]:
    start = _LONG_AGO.isoformat().replace("+00:00", "Z")
    return {
        "url": url,
        "majorApiVersion": version,
        "validFor": {"start": start},
        "operator": "tests",
    }
