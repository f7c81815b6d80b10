"""Counts that are kept beside the rows that they count, by triggers: right in each transaction, whoever writes.

A later migration that makes one of these tables anew (Alembic's batch operations do) drops its triggers
with it, and has to make them again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

# no ON CONFLICT: the statement that sets a trigger off would have its own way in it
_COUNT = """
    INSERT INTO served (kind, ours, rows) SELECT '{table}', NEW.ours, 0
        WHERE NOT NEW.withdrawn
        AND NOT EXISTS (SELECT 1 FROM served WHERE kind = '{table}' AND ours = NEW.ours);
    UPDATE served SET rows = rows + 1
        WHERE NOT NEW.withdrawn AND kind = '{table}' AND ours = NEW.ours;
"""
_DISCOUNT = """
    UPDATE served SET rows = rows - 1
        WHERE NOT OLD.withdrawn AND kind = '{table}' AND ours = OLD.ours;
"""
_OF_EACH_KIND = (
    """
    INSERT INTO served (kind, ours, rows)
        SELECT '{table}', ours, count(*) FROM {table} WHERE NOT withdrawn GROUP BY ours
    """,
    f"""
    CREATE TRIGGER {{table}}_comes AFTER INSERT ON {{table}} WHEN NOT NEW.withdrawn
    BEGIN {_COUNT} END
    """,
    f"""
    CREATE TRIGGER {{table}}_changes AFTER UPDATE OF ours, withdrawn ON {{table}}
    WHEN OLD.withdrawn <> NEW.withdrawn OR OLD.ours <> NEW.ours
    BEGIN {_DISCOUNT} {_COUNT} END
    """,
    f"CREATE TRIGGER {{table}}_goes AFTER DELETE ON {{table}} BEGIN {_DISCOUNT} END",
)

#: Bytes of what is stored.
_STORED = (
    """
    CREATE TRIGGER nar_comes AFTER INSERT ON nar WHEN NEW.stored BEGIN
        UPDATE total SET nar_bytes = nar_bytes + coalesce(NEW.file_size, 0);
    END
    """,
    """
    CREATE TRIGGER nar_changes AFTER UPDATE OF stored, file_size ON nar
    WHEN OLD.stored OR NEW.stored BEGIN
        UPDATE total SET nar_bytes = nar_bytes
            + NEW.stored * coalesce(NEW.file_size, 0) - OLD.stored * coalesce(OLD.file_size, 0);
    END
    """,
    """
    CREATE TRIGGER nar_goes AFTER DELETE ON nar WHEN OLD.stored BEGIN
        UPDATE total SET nar_bytes = nar_bytes - coalesce(OLD.file_size, 0);
    END
    """,
)

#: What waits, which is in force and has its file.
_WAITING = (
    """
    DELETE FROM waiting WHERE NOT EXISTS (
        SELECT 1 FROM path JOIN nar ON nar.file = path.nar_file
        WHERE path.hash_part = waiting.hash_part AND nar.stored AND NOT path.withdrawn
    )
    """,
    """
    CREATE TRIGGER waiting_comes AFTER INSERT ON waiting BEGIN
        UPDATE total SET waiting = waiting + 1;
    END
    """,
    """
    CREATE TRIGGER waiting_goes AFTER DELETE ON waiting BEGIN
        UPDATE total SET waiting = waiting - 1;
    END
    """,
    """
    CREATE TRIGGER path_waits_no_more AFTER UPDATE OF withdrawn ON path WHEN NEW.withdrawn BEGIN
        DELETE FROM waiting WHERE hash_part = NEW.hash_part;
    END
    """,
    """
    CREATE TRIGGER nar_waits_no_more AFTER UPDATE OF stored ON nar
    WHEN OLD.stored AND NOT NEW.stored BEGIN
        DELETE FROM waiting
            WHERE hash_part IN (SELECT hash_part FROM path WHERE nar_file = NEW.file);
    END
    """,
)
_TOTAL = """
    UPDATE total SET
        nar_bytes = (SELECT coalesce(sum(file_size), 0) FROM nar WHERE stored),
        waiting = (SELECT count(*) FROM waiting)
"""


def upgrade() -> None:
    op.create_table(
        "served",
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("ours", sa.Text, primary_key=True),
        sa.Column("rows", sa.BigInteger, nullable=False),
    )
    op.add_column("total", sa.Column("waiting", sa.BigInteger, nullable=False, server_default="0"))
    for table in ("path", "realisation"):
        for statement in _OF_EACH_KIND:
            op.execute(statement.format(table=table))
    for statement in (*_STORED, *_WAITING, _TOTAL):
        op.execute(statement)
