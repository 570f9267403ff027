"""where a merge starts from, and the aliases that wait for it

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

LIVE = sa.text("live")


def upgrade() -> None:
    op.add_column(
        "merges",
        sa.Column(
            "start",
            sa.String(),
            server_default=sa.text("'original'"),
            nullable=False,
            comment="`nf4`: linear layers start from what 4-bit numbers leave of them",
        ),
    )
    op.create_check_constraint("start_known", "merges", "start IN ('original', 'nf4')")
    op.add_column(
        "merges",
        sa.Column(
            "aliases",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="names that point at the version from the merge's publication on",
        ),
    )
    index("version_id", "dtype", "scale", "shard_size", "start")


def downgrade() -> None:
    op.execute("UPDATE merges SET live = false WHERE start <> 'original'")
    index("version_id", "dtype", "scale", "shard_size")
    op.drop_column("merges", "aliases")
    op.drop_column("merges", "start")


def index(*columns: str) -> None:
    op.drop_index("uq_merges_live", table_name="merges", postgresql_where=LIVE)
    op.create_index(
        "uq_merges_live",
        "merges",
        list(columns),
        unique=True,
        postgresql_where=LIVE,
        postgresql_nulls_not_distinct=True,
    )
