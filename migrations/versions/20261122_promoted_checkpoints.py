"""checkpoints that were published as versions

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op
from alembic.util import CommandError

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
    # Before 0009 a version without a job of its own cannot be, and a version is for ever, deleted or not.
    op.execute("LOCK TABLE versions")
    made = op.get_bind().scalar(sa.text("SELECT count(*) FROM versions WHERE checkpoint_id IS NOT NULL"))
    if made:
        raise CommandError(
            f"Versions were published from checkpoints ({made}), which the schema before 0009 cannot hold. Nothing was "
            "changed: stay at 0009 or later, or restore the backup that was made before the upgrade."
        )
    op.drop_constraint(op.f(CHECK), "versions", type_="check")
    op.drop_column("versions", "checkpoint_id")
    op.alter_column("versions", "job_id", nullable=False)
