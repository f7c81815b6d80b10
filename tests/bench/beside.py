"""`python -m tests.bench.beside TREE`: verification of bundles in this tree and in another one, in turns.

TREE is a checkout of another commit with a `.venv` of its own (`make dev`). Each side verifies what it signed itself.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from narseal.cosign import statement, trust
from narseal.cosign.bundle import Bundle
from narseal.cosign.keys import CosignKey
from narseal.cosign.sign import KeylessSigner, KeySigner
from narseal.cosign.statement import AttestedPath
from narseal.cosign.verify import ByIdentity, ByKey, Verifier
from narseal.nix.hashes import Hash
from tests.tools.cache import entry
from tests.tools.sigstore import sigstore

_ROOT = Path(__file__).parent.parent.parent
_PATHS = 512
_ROUNDS = 80
_FIRST = 3  # rounds that do not count


def main() -> None:
    """Print for each kind of bundle how the rates of this tree and the other one compare."""
    trees = {"this": _ROOT, "other": Path(sys.argv[1]).resolve()}
    with sigstore() as instance:
        token = instance.issuer.token(lifetime=7200)
        world = [
            str(instance.trust_config_file),
            token,
            instance.issuer.identity,
            instance.issuer.url,
        ]
        sides = {name: _side(tree, world) for name, tree in trees.items()}
        took: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
        for number in range(_FIRST + _ROUNDS):
            for name in random.sample(sorted(sides), len(sides)):
                for kind, seconds in _round(sides[name]).items():
                    if number >= _FIRST:
                        took[name][kind].append(seconds)
        for side in sides.values():
            side.communicate()
    for kind, ours in took["this"].items():
        theirs = took["other"][kind]
        pairs = statistics.median(other / this for this, other in zip(ours, theirs, strict=True))
        sys.stdout.write(
            f"{kind}: {1 / statistics.mean(ours):,.0f}/s, the other {1 / statistics.mean(theirs):,.0f}/s:"
            f" {statistics.mean(theirs) / statistics.mean(ours):.3f}, median of the pairs {pairs:.3f}\n"
        )


def _side(tree: Path, world: list[str]) -> subprocess.Popen[str]:
    """This file, with the modules of a tree."""
    return subprocess.Popen(
        [tree / ".venv/bin/python", __file__, "side", json.dumps(world)],
        cwd=tree, env={"PYTHONPATH": f"{tree}/proxy:{tree}", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _round(side: subprocess.Popen[str]) -> dict[str, float]:
    """Seconds that each kind took."""
    assert side.stdin and side.stdout
    side.stdin.write("\n")
    side.stdin.flush()
    found: dict[str, float] = json.loads(side.stdout.readline())
    return found


def _measured() -> None:
    """The process of a side: a line of figures for each line of standard input."""
    trusted, token, identity, issuer = json.loads(sys.argv[2])
    known = trust.load(Path(trusted))
    key = CosignKey.generate()
    items = [entry(f"b{n}", b"%d" % n, compression="zstd") for n in range(_PATHS)]
    digests = [hashlib.sha256(item.file).digest() for item in items]
    text = statement.render(
        [
            AttestedPath(item.info, f"{n}.nar.zst", Hash("sha256", digest))
            for n, (item, digest) in enumerate(zip(items, digests, strict=True))
        ]
    )
    by_key, keyless = ByKey((key.public,)), ByIdentity(identity, issuer)
    certified = KeylessSigner(lambda *_, **__: token, known, timeout=30)
    digest = digests[0]
    cases: dict[str, tuple[ByKey | ByIdentity, bytes, int]] = {
        "a file by key": (by_key, KeySigner(key, None, timeout=30).sign_digest(digest), 200),
        "by key with its log entry": (
            by_key,
            KeySigner(key, known, timeout=30).sign_digest(digest),
            50,
        ),
        "a file, keyless": (keyless, certified.sign_digest(digest), 30),
        f"a batch of {_PATHS}, keyless": (keyless, certified.sign_statement(text), 6),
    }
    verifiers = {
        kind: Verifier(expected, None if kind == "a file by key" else known)
        for kind, (expected, _, _) in cases.items()
    }
    for _ in sys.stdin:
        took = {}
        for kind, (_, bundle, count) in cases.items():
            start = time.perf_counter()
            for _ in range(count):
                verifiers[kind].verify(Bundle.parse(bundle), digest)
            took[kind] = (time.perf_counter() - start) / count
        sys.stdout.write(json.dumps(took) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _measured() if sys.argv[1] == "side" else main()
