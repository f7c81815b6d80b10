"""One life for paths and realisations; attestations known by what is signed, and by whom."""

import json
import logging
import time

import sqlalchemy as sa
from alembic import op

from narseal.nix.keys import Signature

revision = "0005"
down_revision = "0004"

_log = logging.getLogger(__name__)


def upgrade() -> None:
    # empty: every path is looked at once, and what bears one of our names is held to our keys
    op.add_column("path", sa.Column("ours", sa.Text, nullable=False, server_default=""))
    op.add_column("nar", sa.Column("verified_at", sa.Float))
    op.add_column("attestation", sa.Column("statement", sa.LargeBinary(32)))
    op.create_index("attestation_statement", "attestation", ["statement", "signer"], unique=False)
    connection = op.get_bind()
    # a content address vouches for no size: what was not measured is asked for anew
    connection.execute(
        sa.text(
            "UPDATE path SET withdrawn = 1 WHERE evidence = 'content-address' AND NOT EXISTS ("
            "SELECT 1 FROM nar WHERE nar.file = path.nar_file AND nar.stored"
            " AND nar.nar_size = path.nar_size)"
        )
    )
    # nor one that was hashed with the path's own name blanked, or for which collisions are made
    connection.execute(
        sa.text(
            "UPDATE path SET withdrawn = 1 WHERE evidence = 'content-address' AND ("
            "refs LIKE '%' || hash_part || '-%'"
            " OR (ca NOT LIKE '%:sha256:%' AND ca NOT LIKE '%:sha512:%'))"
        )
    )
    uploaded = {
        row.hash_part
        for row in connection.execute(
            sa.text("SELECT hash_part FROM path WHERE evidence LIKE 'upload %'")
        )
    }
    old = connection.execute(sa.text("SELECT key, body, evidence FROM realisation")).all()
    op.drop_table("realisation")
    table = op.create_table(
        "realisation",
        sa.Column("key", sa.String(600), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("signatures", sa.Text, nullable=False),
        sa.Column("ours", sa.Text, nullable=False),
        sa.Column("evidence", sa.String(400), nullable=False),
        sa.Column("admitted_at", sa.Float, nullable=False),
        sa.Column("withdrawn", sa.Boolean, nullable=False),
    )
    found = (_row(row.key, row.body, row.evidence, uploaded) for row in old)
    rows = [row for row in found if row is not None]
    if rows:
        op.bulk_insert(table, rows)


def _row(key: str, body: bytes, evidence: str, uploaded: set[str]) -> dict[str, object] | None:
    try:
        tree = json.loads(body)
        out_path = tree["outPath"]
        signatures = [
            f"{item['keyName']}:{item['sig']}" if isinstance(item, dict) else item
            for item in tree["signatures"]
        ]
        if not all(isinstance(text, str) for text in (out_path, *signatures)):
            raise TypeError("outPath or a signature is no text")
        for text in signatures:
            Signature.parse(text)
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("left out: the realisation %s cannot be read: %r", key, error)
        return None
    bare = json.dumps(tree | {"signatures": []}, sort_keys=True, separators=(",", ":")).encode()
    # evidence that a renewal wrote over is not known any more: such a one is asked for anew, unless
    # its path was uploaded, as it was then itself
    if evidence == "stored" and out_path[:32] in uploaded:
        evidence = "upload before"
    return {
        "key": key,
        "body": bare,
        "signatures": "\n".join(sorted(signatures)),
        "ours": "",
        "evidence": evidence,
        "admitted_at": time.time(),
        "withdrawn": evidence == "stored",
    }
