"""The signer's audit log, anchored in the transparency log with narseal's own batches."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import aiohttp
import pytest

from narseal.cosign.bundle import Bundle, Envelope
from narseal.cosign.statement import Statement, audit_heads
from narseal.custody.file import FileKey
from narseal.signer import audit
from narseal.signer.audit import AuditLog
from tests.real.sigstore.conftest import IDENTITY
from tests.tools.asking import must_come
from tests.tools.cache import entry
from tests.tools.command import narseal_command
from tests.tools.narseal import UPSTREAM, narseal_process
from tests.tools.signer import AUDIT, signer
from tests.tools.sigstore import Sigstore
from tests.tools.upstream import FakeCache

pytestmark = pytest.mark.real

ITEMS = [entry(f"anchor-{n}", b"%d" % n, compression="none").signed(UPSTREAM) for n in range(5)]


@pytest.mark.parametrize("mode", ["keyless", "key"])
async def test_a_log_made_anew_with_the_audit_key_is_found(
    mode: str, instance: Sigstore, upstream: FakeCache, tmp_path: Path
) -> None:
    upstream.add(*ITEMS)
    with signer() as found:
        token = tmp_path / "token"
        token.write_text(instance.issuer.token(IDENTITY))
        token.chmod(0o600)
        how = (
            {"mode": "keyless", "identity_token_file": str(token)}
            if mode == "keyless"
            else {"mode": "key", "log": True, "key": f"{found.url}?key=release"}
        )
        cosign = {
            **how, "trust_config": str(instance.trust_config_file), "batch_max_age": "200ms",
            "anchor_audit": True,
        }  # fmt: skip
        keys = {"key": [{"url": f"{found.url}?key=operator-1"}]}
        with narseal_process(
            tmp_path / "n", {"url": upstream.url}, signing=keys, cosign=cosign
        ) as process:
            async with aiohttp.ClientSession() as session:
                earlier = tmp_path / "earlier.log"
                for item in ITEMS:
                    await session.get(f"{process.url}/{item.hash}.narinfo")
                    if not earlier.exists():
                        shutil.copy(found.log, earlier)
                        shutil.copy(f"{found.log}.head", f"{earlier}.head")
                    await session.get(f"{process.url}/{item.info.url}")
                address = f"{process.url}/attestations/sha256:{ITEMS[0].info.nar_hash.digest.hex()}"
                body = await must_come(session, address)
                content = Bundle.parse(body.splitlines()[0]).content
                assert isinstance(content, Envelope)
                [head] = audit_heads(Statement.parse(content.payload))
                # the bundle is found by the hash of the line that it anchors
                line = found.log.read_bytes().splitlines()[head.lines - 1]
                assert hashlib.sha256(line).digest() == head.digest
                async with session.get(
                    f"{process.url}/attestations/sha256:{head.digest.hex()}"
                ) as response:
                    assert await response.read() == body
                async with session.get(f"{process.url}/cosign.pub") as response:
                    public = await response.text()
        bundles = tmp_path / "bundles"
        bundles.write_bytes(body)
        log = tmp_path / "audit.log"
        shutil.copy(found.log, log)
        shutil.copy(f"{found.log}.head", f"{log}.head")
        key_file = tmp_path / "audit.secret"
        shutil.copy(found.folder / "audit.secret", key_file)
        key_file.chmod(0o600)
    (tmp_path / "cosign.pub").write_text(public)
    who: list[str | Path] = (
        ["--identity", IDENTITY, "--issuer", instance.issuer.url]
        if mode == "keyless"
        else ["--key", tmp_path / "cosign.pub"]
    )
    words: list[str | Path] = [
        "audit", "verify", log, "--public-key", str(AUDIT.public), "--anchors", bundles, *who,
        "--trusted-root", instance.trusted_root_file,
    ]  # fmt: skip
    good = narseal_command(*words)
    assert good.returncode == 0, good.stderr
    # log and head put back together to an older state: only what was anchored tells
    rolled_back = [earlier if word == log else word for word in words]
    assert narseal_command(*rolled_back[:2], earlier, *words[3:5]).returncode == 0
    assert narseal_command(*rolled_back).returncode == 1
    # somebody who has the audit key makes a log of his own, in which one signature never was
    records = [r for r in audit.records(log) if r["kind"] != "checkpoint"]
    log.unlink()
    Path(f"{log}.head").unlink()
    made = AuditLog(log, FileKey.load(f"file:{key_file}"))
    for record in [*records[:1], *records[2:], records[-1]]:
        made.append([{k: v for k, v in record.items() if k not in ("n", "prev", "time")}])
    made.close()
    assert audit.verify(log, AUDIT.public).problems == ()
    bad = narseal_command(*words, "--json")
    assert bad.returncode == 1
    assert "is not what was anchored" in json.loads(bad.stdout)["problems"][0]
    assert narseal_command(*words[:7]).returncode == 2
