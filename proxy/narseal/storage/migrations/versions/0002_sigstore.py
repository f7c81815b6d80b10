"""Sigstore: the queue, attestations and their subjects, signatures of single files."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "waiting",
        sa.Column("hash_part", sa.String(32), sa.ForeignKey("path.hash_part"), primary_key=True),
        sa.Column("since", sa.Float, nullable=False),
    )
    op.create_index("waiting_since", "waiting", ["since"])
    op.create_table(
        "attestation",
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column("predicate_type", sa.String(250), nullable=False),
        sa.Column("made_at", sa.Float, nullable=False),
    )
    op.create_table(
        "subject",
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column(
            "attestation",
            sa.LargeBinary(32),
            sa.ForeignKey("attestation.digest"),
            primary_key=True,
        ),
    )
    op.create_table(
        "attested",
        sa.Column("hash_part", sa.String(32), sa.ForeignKey("path.hash_part"), primary_key=True),
        sa.Column("file", sa.String(80), sa.ForeignKey("nar.file"), primary_key=True),
        sa.Column(
            "attestation", sa.LargeBinary(32), sa.ForeignKey("attestation.digest"), nullable=False
        ),
    )
    op.create_table(
        "file_signature",
        sa.Column("file", sa.String(80), sa.ForeignKey("nar.file"), primary_key=True),
        sa.Column("bundle", sa.LargeBinary, nullable=False),
    )
