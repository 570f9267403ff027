"""how urgent a tenant's jobs may be to the others

Revision ID: 0010
Revises: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "jobs more urgent than this come first among the tenant's own only"
    op.add_column(
        "tenants",
        sa.Column("priority_floor", sa.SmallInteger(), server_default=sa.text("100"), nullable=False, comment=comment),
    )


def downgrade() -> None:
    op.drop_column("tenants", "priority_floor")
