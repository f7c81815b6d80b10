"""Attestations by others: who signed them; and finding paths by the digests of their content."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("attestation", sa.Column("signer", sa.String(2100)))
    op.create_index("path_nar_hash", "path", ["nar_hash"])
    op.create_index("nar_file_hash", "nar", ["file_hash"])
