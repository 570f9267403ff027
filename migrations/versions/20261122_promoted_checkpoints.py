"""checkpoints that were published as versions

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

CHECK = "ck_versions_made_by_job_or_checkpoint"


def upgrade() -> None:
    op.alter_column("versions", "job_id", nullable=True)
    comment = "the checkpoint that was published; null: the result of job_id"
    op.add_column("versions", sa.Column("checkpoint_id", sa.Uuid(), nullable=True, comment=comment))
    op.create_foreign_key(
        op.f("fk_versions_checkpoint_id_checkpoints"), "versions", "checkpoints", ["checkpoint_id"], ["id"]
    )
    op.create_unique_constraint(op.f("uq_versions_checkpoint_id"), "versions", ["checkpoint_id"])
    op.create_check_constraint(op.f(CHECK), "versions", "(job_id IS NULL) <> (checkpoint_id IS NULL)")


def downgrade() -> None:
    op.drop_constraint(op.f(CHECK), "versions", type_="check")
    op.drop_column("versions", "checkpoint_id")
    op.alter_column("versions", "job_id", nullable=False)
