"""One life for paths and realisations; attestations known by what is signed, and by whom."""

import json
import time

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # empty: every path is looked at once, and what bears one of our names is held to our keys
    op.add_column("path", sa.Column("ours", sa.Text, nullable=False, server_default=""))
    op.add_column("nar", sa.Column("verified_at", sa.Float))
    op.add_column("attestation", sa.Column("statement", sa.LargeBinary(32)))
    op.create_index("attestation_statement", "attestation", ["statement", "signer"], unique=False)
    connection = op.get_bind()
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
    rows = [_row(*row) for row in old]
    if rows:
        op.bulk_insert(table, rows)


def _row(key: str, body: bytes, evidence: str) -> dict[str, object]:
    tree = json.loads(body)
    signatures = [
        f"{item['keyName']}:{item['sig']}" if isinstance(item, dict) else str(item)
        for item in tree["signatures"]
    ]
    bare = json.dumps(tree | {"signatures": []}, sort_keys=True, separators=(",", ":")).encode()
    # evidence that a renewal wrote over is not known any more: such a one is asked for anew
    return {
        "key": key,
        "body": bare,
        "signatures": "\n".join(sorted(signatures)),
        "ours": "",
        "evidence": evidence,
        "admitted_at": time.time(),
        "withdrawn": evidence == "stored",
    }
