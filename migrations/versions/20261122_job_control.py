"""job control: attempts as rows, pause, deadlines, retries, workers that were seen, curves that read fast

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

CURVES = {
    "step": (sa.BigInteger(), "bigint"),
    "train_loss": (sa.Double(), "double precision"),
    "valid_loss": (sa.Double(), "double precision"),
    "learning_rate": (sa.Double(), "double precision"),
    "tokens_per_second": (sa.Double(), "double precision"),
}
QUEUED = sa.text("state = 'queued'")
CLAIMABLE = sa.text("state = 'queued' AND paused_at IS NULL")


def upgrade() -> None:
    op.create_table(
        "job_attempts",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(), nullable=False),
        sa.Column(
            "started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ending", sa.String(), nullable=True),
        sa.Column("error_class", sa.String(), nullable=True),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("last_step", sa.BigInteger(), nullable=True),
        sa.Column(
            "resume",
            sa.String(),
            nullable=True,
            comment="exact or best_effort; null: it started from the beginning",
        ),
        sa.CheckConstraint("(ended_at IS NULL) = (ending IS NULL)", name=op.f("ck_job_attempts_ended_has_ending")),
        sa.CheckConstraint(
            "ending IN ('succeeded', 'failed', 'cancelled', 'released', 'lost')",
            name=op.f("ck_job_attempts_ending_known"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_attempts_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", "attempt", name=op.f("pk_job_attempts")),
    )
    # What runs while this migration does ends like any other attempt.
    op.execute(
        """INSERT INTO job_attempts (job_id, attempt, fence, worker, started_at)
           SELECT id, attempt, fence, worker, coalesce(heartbeat_at, started_at, created_at) FROM jobs
           WHERE state IN ('running', 'cancelling')"""
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("queues", sa.ARRAY(sa.String()), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "deadline_seconds",
            sa.Integer(),
            server_default=sa.text("604800"),
            nullable=False,
            comment="the longest it may wait in the queue, counted anew at every return",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "deadline_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="when waiting ends in failure; null while paused",
        ),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "paused_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="set: a queued job may not be claimed, a running one is asked to let go",
        ),
    )
    op.add_column("jobs", sa.Column("retry_of", sa.Uuid(), nullable=True, comment="the job that this one repeats"))
    op.create_foreign_key(op.f("fk_jobs_retry_of_jobs"), "jobs", "jobs", ["retry_of"], ["id"])
    op.drop_index("ix_jobs_claim", table_name="jobs")
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["tenant_id", "queue", "priority", "run_after", "id"],
        unique=False,
        postgresql_where=CLAIMABLE,
    )
    op.create_index("ix_jobs_queued", "jobs", ["tenant_id", "deadline_at"], unique=False, postgresql_where=QUEUED)
    op.execute("UPDATE jobs SET deadline_at = clock_timestamp() + interval '7 days' WHERE state = 'queued'")
    for name, (column_type, cast) in CURVES.items():
        number = f"CASE WHEN type = 'metrics' AND jsonb_typeof(data -> '{name}') = 'number'"
        computed = sa.Computed(f"{number} THEN (data ->> '{name}')::{cast} END", persisted=True)
        op.add_column("job_events", sa.Column(name, column_type, computed, nullable=True))
    op.create_index(
        "ix_job_events_metrics",
        "job_events",
        ["job_id", "fence", "step"],
        unique=False,
        postgresql_where=sa.text("step IS NOT NULL"),
        postgresql_include=["id", "train_loss", "valid_loss", "learning_rate", "tokens_per_second"],
    )


def downgrade() -> None:
    op.drop_index("ix_job_events_metrics", table_name="job_events")
    for name in reversed(CURVES):
        op.drop_column("job_events", name)
    op.drop_index("ix_jobs_queued", table_name="jobs")
    op.drop_index("ix_jobs_claim", table_name="jobs")
    for name in ("retry_of", "paused_at", "deadline_at", "deadline_seconds"):
        op.drop_column("jobs", name)
    op.create_index("ix_jobs_claim", "jobs", ["queue", "priority", "run_after", "id"], postgresql_where=QUEUED)
    op.drop_table("workers")
    op.drop_table("job_attempts")
