"""The bundles of sigstore/sigstore-conformance, whose clone SIGSTORE_CONFORMANCE names."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest

from narseal.client.release import digest
from narseal.cosign import trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignPublicKey
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.errors import NarsealError

pytestmark = pytest.mark.conformance

_ASSETS = Path(os.environ.get("SIGSTORE_CONFORMANCE", "/nonexistent")) / "test/assets/bundle-verify"
_CASES = sorted(path for path in _ASSETS.glob("*") if path.is_dir())
_IDENTITY = (
    "https://github.com/sigstore-conformance/extremely-dangerous-public-oidc-beacon/.github"
    "/workflows/extremely-dangerous-oidc-beacon.yml@refs/heads/main"
)
_ISSUER = "https://token.actions.githubusercontent.com"


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_conformance_bundle(case: Path) -> None:
    error: NarsealError | None = None
    try:
        _verify(case)
    except NarsealError as caught:
        error = caught
    assert (error is not None) == case.name.endswith("_fail"), error


def _verify(case: Path) -> None:
    root = case / "trusted_root.json"
    if (case / "key.pub").exists():
        known = trust.load(root) if root.exists() else None
        key = CosignPublicKey.parse((case / "key.pub").read_text())
        verifier = Verifier(ByKey((key,)), known)
    else:
        shipped = resources.files("sigstore._store") / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"
        known = trust.load(root if root.exists() else Path(str(shipped)) / "trusted_root.json")
        expected = ByIdentity(_text(case / "identity", _IDENTITY), _text(case / "issuer", _ISSUER))
        verifier = Verifier(expected, known)
    artifact = case / "artifact"
    file = artifact if artifact.exists() else _ASSETS / "a.txt"
    verifier.verify(Bundle.parse((case / "bundle.sigstore.json").read_bytes()), digest(file))


def _text(file: Path, default: str) -> str:
    return file.read_text().strip() if file.exists() else default
