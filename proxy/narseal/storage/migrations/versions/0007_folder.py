"""The mark of the storage folder, so that no other is taken for it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "folder",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("mark", sa.String(64), nullable=False),
        sa.Column("settled", sa.Boolean, nullable=False),
    )
