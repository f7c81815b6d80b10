"""One running Sigstore instance for all tests here, and files signed in it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from narseal.cosign import statement, trust
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeylessSigner, KeySigner, Signer
from narseal.cosign.statement import AttestedPath
from narseal.nix.hashes import Hash
from tests.tools.cache import entry
from tests.tools.cosign import Cosign
from tests.tools.debian import scratch
from tests.tools.sigstore import Sigstore, sigstore

PASSWORD = "correct horse"
IDENTITY = "ci@example.org"


@pytest.fixture(scope="session")
def instance() -> Iterator[Sigstore]:
    with sigstore() as running:
        yield running


@pytest.fixture
def cosign() -> Iterator[Cosign]:
    with tempfile.TemporaryDirectory(prefix="cosign-", dir=scratch()) as folder:
        Path(folder).chmod(0o755)
        yield Cosign(Path(folder))


@dataclass(frozen=True)
class Signed:
    """What the table is about: files, keys and bundles, all made by narseal."""

    folder: Path
    first: Path
    last: Path
    stranger: Path
    key: Path
    public: Path
    other_public: Path

    def bundle(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@pytest.fixture(scope="session")
def signed(instance: Sigstore) -> Iterator[Signed]:
    """A file and a batch of 1,000 paths, each signed in every mode."""
    with tempfile.TemporaryDirectory(prefix="signed-", dir=scratch()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        files = Signed(
            folder, folder / "first.nar", folder / "last.nar", folder / "stranger.nar",
            folder / "cosign.key", folder / "cosign.pub", folder / "other.pub",
        )  # fmt: skip
        # uncompressed: the file's digest is the NAR's, so that 1,000 paths are 1,000 subjects
        entries = [entry(f"p{n}", b"%d" % n, compression="none") for n in range(1000)]
        files.first.write_bytes(entries[0].file)
        files.last.write_bytes(entries[-1].file)
        files.stranger.write_bytes(entry("stranger", b"?", compression="none").file)
        key, other = CosignKey.generate(), CosignKey.generate()
        files.key.write_text(key.render(PASSWORD.encode()))
        files.key.chmod(0o600)
        files.public.write_text(key.public.render())
        files.other_public.write_text(other.public.render())
        known = trust.load(instance.trust_config_file)
        signers: dict[str, Signer] = {
            "key": KeySigner(key, None, timeout=20),
            "log": KeySigner(key, known, timeout=20),
            "keyless": KeylessSigner(lambda: instance.issuer.token(IDENTITY), known, timeout=20),
        }
        for n in range(3):  # so that proofs have hashes
            signers["log"].sign_digest(sha256(b"%d before" % n))
        batch = statement.render(
            AttestedPath(e.info, f"{n}.nar", Hash.parse(f"sha256:{sha256(e.file).hex()}"))
            for n, e in enumerate(entries)
        )
        for mode, signer in signers.items():
            digest = sha256(files.first.read_bytes())
            files.bundle(f"{mode}-blob").write_bytes(signer.sign_digest(digest))
            files.bundle(f"{mode}-batch").write_bytes(signer.sign_statement(batch))
        _swap_entries(files)
        yield files


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _swap_entries(files: Signed) -> None:
    """Bundles with the log entry of another one, which is in the log as truly."""
    for mode in ("log", "keyless"):
        blob = json.loads(files.bundle(f"{mode}-blob").read_bytes())
        batch = json.loads(files.bundle(f"{mode}-batch").read_bytes())
        mine, theirs = blob["verificationMaterial"], batch["verificationMaterial"]
        mine["tlogEntries"], theirs["tlogEntries"] = theirs["tlogEntries"], mine["tlogEntries"]
        files.bundle(f"{mode}-blob-swapped").write_text(json.dumps(blob))
        files.bundle(f"{mode}-batch-swapped").write_text(json.dumps(batch))
