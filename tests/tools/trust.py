"""Whom tests trust: the public-good Sigstore instance's root, and what it becomes when it is damaged.

tests/vectors/sigstore holds what sigstore-python 4 brings along (sigstore/_store).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent.parent / "vectors" / "sigstore"
ROOT = VECTORS / "trusted_root.json"


def client_config() -> bytes:
    """The root beside services that one can sign with: a client trust config."""
    services = json.loads((VECTORS / "signing_config.json").read_text())
    log = {"url": "https://log.example", "majorApiVersion": 2, "operator": "example"}
    services["rekorTlogUrls"] = [log | {"validFor": {"start": "2021-01-12T11:53:27Z"}}]
    return json.dumps(
        {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": json.loads(ROOT.read_text()),
            "signingConfig": services,
        }
    ).encode()


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The root after somebody changed it."""
    tree = json.loads(ROOT.read_text())
    change(tree)
    return json.dumps(tree).encode()
