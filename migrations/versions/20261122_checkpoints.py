"""checkpoints

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False, comment="token of the owner that saved it"),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="optimizer steps that are in it"),
        sa.Column(
            "manifest",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="files with size and digest",
        ),
        sa.Column(
            "metrics",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="how training stood: losses by name",
        ),
        sa.Column("state", sa.String(), server_default=sa.text("'committed'"), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("state IN ('committed', 'corrupt', 'pruned')", name=op.f("ck_checkpoints_state_known")),
        sa.CheckConstraint("step >= 0", name=op.f("ck_checkpoints_step_not_negative")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_checkpoints_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("job_id", "fence", "step", name=op.f("uq_checkpoints_job_id_fence_step")),
    )
    op.create_index("ix_checkpoints_listing", "checkpoints", ["job_id", "created_at", "id"], unique=False)
    op.create_index(
        "ix_checkpoints_resume",
        "checkpoints",
        ["job_id", "step", "fence"],
        unique=False,
        postgresql_where=sa.text("state = 'committed'"),
    )
    op.create_table(
        "checkpoint_files",
        sa.Column("checkpoint_id", sa.Uuid(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("blob_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_checkpoint_files_blob_id_blobs")),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_checkpoint_files_checkpoint_id_checkpoints")
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "path", name=op.f("pk_checkpoint_files")),
    )
    op.create_index(op.f("ix_checkpoint_files_blob_id"), "checkpoint_files", ["blob_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_checkpoint_files_blob_id"), table_name="checkpoint_files")
    op.drop_table("checkpoint_files")
    op.drop_index("ix_checkpoints_resume", table_name="checkpoints", postgresql_where=sa.text("state = 'committed'"))
    op.drop_index("ix_checkpoints_listing", table_name="checkpoints")
    op.drop_table("checkpoints")
