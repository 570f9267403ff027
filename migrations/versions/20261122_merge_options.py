"""scale and shard size of a merge

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

LIVE = sa.text("live")


def upgrade() -> None:
    op.add_column(
        "merges",
        sa.Column(
            "scale",
            sa.Double(),
            server_default=sa.text("1"),
            nullable=False,
            comment="what the change is multiplied by, besides the adapter's own scaling",
        ),
    )
    comment = "bytes of tensors per shard; null keeps the base's shards"
    op.add_column("merges", sa.Column("shard_size", sa.BigInteger(), nullable=True, comment=comment))
    op.drop_index("uq_merges_live", table_name="merges", postgresql_where=LIVE)
    op.create_index(
        "uq_merges_live",
        "merges",
        ["version_id", "dtype", "scale", "shard_size"],
        unique=True,
        postgresql_where=LIVE,
        postgresql_nulls_not_distinct=True,
    )


def downgrade() -> None:
    # Of a schema that cannot tell them apart, only those made without options can stay live.
    op.execute("UPDATE merges SET live = false WHERE scale <> 1 OR shard_size IS NOT NULL")
    op.drop_index("uq_merges_live", table_name="merges", postgresql_where=LIVE)
    op.drop_column("merges", "shard_size")
    op.drop_column("merges", "scale")
    op.create_index("uq_merges_live", "merges", ["version_id", "dtype"], unique=True, postgresql_where=LIVE)
