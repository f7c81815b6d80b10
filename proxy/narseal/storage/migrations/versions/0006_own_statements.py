"""What narseal's own bundles cover is in `attested` alone; `subject` keeps the audit heads of them."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute(
        "DELETE FROM subject"
        " WHERE attestation IN (SELECT digest FROM attestation WHERE signer IS NULL)"
        " AND digest IN (SELECT nar_hash FROM nar UNION SELECT file_hash FROM nar)"
    )
