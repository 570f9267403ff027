"""how many events of its owner a job has stored

Revision ID: 0012
Revises: 0011
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "events of the current owner's heartbeats that are stored"
    op.add_column(
        "jobs", sa.Column("events_told", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment=comment)
    )


def downgrade() -> None:
    op.drop_column("jobs", "events_told")
