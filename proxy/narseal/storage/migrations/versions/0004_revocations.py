"""Revocations: of keys by name, of cosign keys by hint, of identities from a time on."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "revocation",
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(2048), primary_key=True),
        sa.Column("issuer", sa.String(2048), primary_key=True),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("reason", sa.String(400), nullable=False),
        sa.Column("revoked_at", sa.Float, nullable=False),
    )
