"""the merge recipe of a version

Revision ID: 0005
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "lora_core.recipe as JSON; null: made from headers when needed"
    op.add_column("versions", sa.Column("merge_recipe", sa.String(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("versions", "merge_recipe")
