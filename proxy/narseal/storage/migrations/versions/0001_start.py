"""The first index: paths, NAR files, refused sources, realisations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "nar",
        sa.Column("file", sa.String(80), primary_key=True),
        sa.Column("nar_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("nar_size", sa.BigInteger, nullable=False),
        sa.Column("compression", sa.String(16), nullable=False),
        sa.Column("file_hash", sa.LargeBinary(32)),
        sa.Column("file_size", sa.BigInteger),
        sa.Column("upstream", sa.String(2048), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("published_as", sa.String(80)),
        sa.Column("stored", sa.Boolean, nullable=False),
    )
    op.create_index("nar_source", "nar", ["upstream", "url"])
    op.create_table(
        "path",
        sa.Column("hash_part", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(211), nullable=False),
        sa.Column("nar_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("nar_size", sa.BigInteger, nullable=False),
        sa.Column("refs", sa.Text, nullable=False),
        sa.Column("deriver", sa.String(250)),
        sa.Column("ca", sa.String(250)),
        sa.Column("signatures", sa.Text, nullable=False),
        sa.Column("extra", sa.Text, nullable=False),
        sa.Column("nar_file", sa.String(80), sa.ForeignKey("nar.file"), nullable=False),
        sa.Column("evidence", sa.String(400), nullable=False),
        sa.Column("admitted_at", sa.Float, nullable=False),
        sa.Column("withdrawn", sa.Boolean, nullable=False),
    )
    op.create_index("path_nar_file", "path", ["nar_file"])
    op.create_table(
        "refusal",
        sa.Column("upstream", sa.String(2048), primary_key=True),
        sa.Column("url", sa.String(2048), primary_key=True),
        sa.Column("nar_hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("reason", sa.String(40), nullable=False),
        sa.Column("until", sa.Float, nullable=False),
    )
    op.create_table(
        "realisation",
        sa.Column("key", sa.String(600), primary_key=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("evidence", sa.String(400), nullable=False),
    )
    total = op.create_table(
        "total",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("nar_bytes", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(total, [{"id": 1, "nar_bytes": 0}])
