"""the merge recipe of a checkpoint's adapter

Revision ID: 0011
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "of its adapter, while its files are kept; null: made from headers when needed"
    op.add_column("checkpoints", sa.Column("merge_recipe", sa.String(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("checkpoints", "merge_recipe")
