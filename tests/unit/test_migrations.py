"""An index of an earlier release, brought to the newest schema."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import alembic.command
import alembic.config
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from narseal.nix.hashes import Hash
from narseal.storage import Index, migrate
from narseal.storage.engine import newest_revision
from narseal.storage.inventory import Inventory
from tests.tools.cache import key, store_path

SIGNED, MEASURED, LIED, UPLOADED = (
    store_path(name) for name in ("signed", "measured", "lied", "uploaded")
)
#: Bodies of realisations that nobody can read.
DAMAGED = [b"", b"\xff", b"[]", b"{}", b'{"outPath":"x"}', b'{"signatures":[]}',
           b'{"outPath":1,"signatures":[]}', b'{"outPath":"x","signatures":{"a":1}}',
           b'{"outPath":"x","signatures":[{"keyName":"a-1"}]}']  # fmt: skip


def migrations() -> alembic.config.Config:
    config = alembic.config.Config()
    scripts = resources.files("narseal.storage") / "migrations"
    config.set_main_option("script_location", str(scripts))
    return config


def upgrade(connection: sa.Connection, revision: str) -> None:
    config = migrations()
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, revision)


def index_of_0_1_0(file: Path) -> None:
    """Paths on each kind of evidence, and realisations that a renewal wrote over."""
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        upgrade(connection, "0004")
        for path, evidence, size, stored in (
            (SIGNED, "signature upstream-1", 8, False),
            (MEASURED, "content-address", 8, True),
            (LIED, "content-address", 999_999, True),
            (UPLOADED, "upload ci", 8, True),
        ):
            file_name = f"{Hash.sha256(path.name.encode()).nix32}.nar"
            nar = {"file": file_name, "hash": bytes(32), "stored": stored}
            connection.execute(
                sa.text(
                    "INSERT INTO nar VALUES"
                    " (:file, :hash, 8, 'none', :hash, 8, '', '', NULL, :stored)"
                ),
                nar,
            )
            signature = str(key("operator-1").sign(b"x"))
            row = {"part": path.hash_part, "name": path.name, "size": size, "now": time.time()}
            connection.execute(
                sa.text(
                    "INSERT INTO path VALUES (:part, :name, :hash, :size, '', NULL, NULL,"
                    " :signature, '[]', :file, :evidence, :now, 0)"
                ),
                nar | row | {"signature": signature, "evidence": evidence},
            )
        for path in (SIGNED, UPLOADED):
            body = {
                "outPath": str(path),
                "signatures": [{"keyName": "a-1", "sig": "A" * 86 + "=="}],
            }
            connection.execute(
                sa.text("INSERT INTO realisation VALUES (:key, :body, 'stored')"),
                {"key": _address(path.name), "body": json.dumps(body).encode()},
            )
        for number, damaged in enumerate(DAMAGED):
            connection.execute(
                sa.text("INSERT INTO realisation VALUES (:key, :body, 'stored')"),
                {"key": _address(f"damaged-{number}"), "body": damaged},
            )
    engine.dispose()


def _address(name: str) -> str:
    return f"build-trace-v2/{store_path(f'{name}.drv')}/out.doi"


async def test_what_0_1_0_did_not_measure_is_not_served_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index_of_0_1_0(tmp_path / "index.sqlite")
    url = f"sqlite:///{tmp_path}/index.sqlite"
    migrate(url)
    skipped = [text for text in caplog.messages if "cannot be read" in text]
    assert len(skipped) == len(DAMAGED) and all("damaged-" in text for text in skipped)
    index = Index(url, "/nix/store")
    running = asyncio.create_task(index.run())
    found = {}
    for path in (SIGNED, MEASURED, LIED, UPLOADED):
        admitted = await index.path(path.hash_part)
        assert admitted
        found[path] = admitted[0]
    assert {path for path, record in found.items() if record.withdrawn} == {LIED}
    # whose signatures are whose is looked at once
    assert all(record.ours == frozenset() and record.signatures for record in found.values())
    assert len(await index.paths.lacking(["operator-1"], after="", limit=9)) == 3
    # a realisation whose evidence was written over: of an upload it was the upload
    for path, is_withdrawn in ((SIGNED, True), (UPLOADED, False)):
        record = await index.realisation(_address(path.name))
        assert record and record.withdrawn == is_withdrawn
        assert [s.key_name for s in record.signatures] == ["a-1"]
    for number in range(len(DAMAGED)):
        assert await index.realisation(_address(f"damaged-{number}")) is None
    await index.close()
    await running


async def test_what_narseal_itself_attested_is_known_by_its_paths_alone(tmp_path: Path) -> None:
    """0.1.0 kept the digests of our own batches like others': whoever asked for one got the bundle."""
    index_of_0_1_0(tmp_path / "index.sqlite")
    ours, theirs, head = b"o" * 32, b"t" * 32, b"h" * 32
    engine = sa.create_engine(f"sqlite:///{tmp_path}/index.sqlite")
    with engine.begin() as connection:
        for digest, signer in ((ours, None), (theirs, "a cosign key")):
            connection.execute(
                sa.text("INSERT INTO attestation VALUES (:digest, 'x', 1, :signer)"),
                {"digest": digest, "signer": signer},
            )
        for digest, attestation in ((bytes(32), ours), (head, ours), (bytes(32), theirs)):
            connection.execute(
                sa.text("INSERT INTO subject VALUES (:digest, :attestation)"),
                {"digest": digest, "attestation": attestation},
            )
        row = connection.execute(
            sa.text("SELECT nar_file FROM path WHERE hash_part = :part"),
            {"part": UPLOADED.hash_part},
        ).one()
        connection.execute(
            sa.text("INSERT INTO attested VALUES (:part, :file, :attestation)"),
            {"part": UPLOADED.hash_part, "file": row.nar_file, "attestation": ours},
        )
    engine.dispose()
    url = f"sqlite:///{tmp_path}/index.sqlite"
    migrate(url)
    index = Index(url, "/nix/store")
    running = asyncio.create_task(index.run())
    attestations = index.attestations
    assert [found.digest for found in await attestations.covering(bytes(32))] == [theirs]
    assert [found.digest for found in await attestations.covering(head)] == [ours]
    hash_parts = [UPLOADED.hash_part, MEASURED.hash_part]
    assert [found.digest for found in await attestations.ours(hash_parts)] == [ours]
    await index.close()
    await running


async def test_what_was_not_counted_yet_is_counted_once(tmp_path: Path) -> None:
    index_of_0_1_0(tmp_path / "index.sqlite")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/index.sqlite")
    with engine.begin() as connection:
        upgrade(connection, "0007")
        connection.execute(sa.text("UPDATE path SET ours = 'a-1' WHERE name = 'uploaded'"))
        # what is not stored, and what is withdrawn, waited out of sight
        connection.execute(sa.text("INSERT INTO waiting SELECT hash_part, 1 FROM path"))
    engine.dispose()
    url = f"sqlite:///{tmp_path}/index.sqlite"
    migrate(url)
    index = Index(url, "/nix/store")
    running = asyncio.create_task(index.run())
    assert await index.count() == 3
    assert await index.stored_bytes() == 3 * 8
    assert await index.paths.count_lacking(["a-1"]) == 2
    assert await index.realisations.count_lacking(["a-1"]) == 1
    assert await index.attestations.queue() == (2, 1.0)
    await index.close()
    await running
    with Inventory.opened(url, "/nix/store") as inventory:
        assert inventory.miscounts() == []


def test_the_newest_revision_is_alembics_head() -> None:
    assert newest_revision() == ScriptDirectory.from_config(migrations()).get_current_head()


def test_a_plain_start_imports_neither_alembic_nor_sigstore_nor_cel(tmp_path: Path) -> None:
    """It takes 11 MB of every worker, Sigstore's libraries 20, those of CEL 6."""
    url = f"sqlite:///{tmp_path / 'index.sqlite'}"
    migrate(url)
    again = f"""
import sys
import narseal.server.supervisor
from narseal.storage import migrate
migrate({url!r})
print({{"alembic", "celpy", "sigstore", "tuf"}} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", again], text=True) == "set()\n"
