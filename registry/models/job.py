"""The job row is the truth; who owns it is decided by its fence."""

import uuid
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Computed,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    Sequence,
    SmallInteger,
    String,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from registry.db import Base
from registry.models.columns import Created, Id, Json, Moment, Serial

fence_seq = Sequence("fence_seq", metadata=Base.metadata)


def number_in_metrics(name: str, as_type: str) -> Computed:
    """A column that Postgres fills from `data` of metrics events, where it holds a number of this name."""
    is_number = f"type = 'metrics' AND jsonb_typeof(data -> '{name}') = 'number'"
    return Computed(f"CASE WHEN {is_number} THEN (data ->> '{name}')::{as_type} END", persisted=True)


OWNED = "state IN ('running', 'cancelling')"
TERMINAL = "state IN ('succeeded', 'failed', 'cancelled')"


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("kind IN ('train', 'merge')", name="kind_known"),
        CheckConstraint(
            "state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')",
            name="state_known",
        ),
        CheckConstraint(f"({OWNED}) = (lease_expires_at IS NOT NULL)", name="lease_iff_owned"),
        CheckConstraint(f"NOT ({OWNED}) OR (fence IS NOT NULL AND worker IS NOT NULL)", name="owned_has_fence"),
        CheckConstraint(f"({TERMINAL}) = (finished_at IS NOT NULL)", name="terminal_has_end"),
        Index(
            "ix_jobs_claim",
            *("tenant_id", "queue", "priority", "run_after", "id"),
            postgresql_where=text("state = 'queued' AND paused_at IS NULL"),
        ),
        Index("ix_jobs_queued", "tenant_id", "deadline_at", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_lease", "lease_expires_at", postgresql_where=text(OWNED)),
        Index("ix_jobs_listing", "tenant_id", "kind", "created_at", "id"),
    )

    id: Mapped[Id]
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str]
    spec: Mapped[Json] = mapped_column(comment="what to do; never changes after submit")
    request: Mapped[Json] = mapped_column(comment="the request as the client sent it, for the job object")
    adapter_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("adapters.id"), comment="where it publishes")
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    training_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    validation_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"), index=True)
    queue: Mapped[str] = mapped_column(server_default=text("'default'"))
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("100"))
    state: Mapped[str] = mapped_column(server_default=text("'queued'"))
    run_after: Mapped[Created]
    deadline_seconds: Mapped[int] = mapped_column(
        server_default=text("604800"), comment="the longest it may wait in the queue, counted anew at every return"
    )
    deadline_at: Mapped[Moment | None] = mapped_column(comment="when waiting ends in failure; null while paused")
    paused_at: Mapped[Moment | None] = mapped_column(
        comment="set: a queued job may not be claimed, a running one is asked to let go"
    )
    retry_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"), comment="the job that this one repeats")
    attempt: Mapped[int] = mapped_column(server_default=text("0"), comment="number of claims")
    fence: Mapped[int | None] = mapped_column(BigInteger, comment="token of the current or last owner")
    worker: Mapped[str | None]
    lease_expires_at: Mapped[Moment | None]
    heartbeat_at: Mapped[Moment | None]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    events_told: Mapped[int] = mapped_column(
        BigInteger, server_default=text("0"), comment="events of the current owner's heartbeats that are stored"
    )
    infra_failures: Mapped[int] = mapped_column(server_default=text("0"))
    error_class: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[Created]
    started_at: Mapped[Moment | None]
    finished_at: Mapped[Moment | None]


class JobAttempt(Base):
    """One claim of a job and how it ended, written in the transactions that make it so."""

    __tablename__ = "job_attempts"
    __table_args__ = (
        CheckConstraint("ending IN ('succeeded', 'failed', 'cancelled', 'released', 'lost')", name="ending_known"),
        CheckConstraint("(ended_at IS NULL) = (ending IS NULL)", name="ended_has_ending"),
    )

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    fence: Mapped[int] = mapped_column(BigInteger)
    worker: Mapped[str]
    started_at: Mapped[Created]
    ended_at: Mapped[Moment | None]
    ending: Mapped[str | None]
    error_class: Mapped[str | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    last_step: Mapped[int | None] = mapped_column(BigInteger)
    resume: Mapped[str | None] = mapped_column(comment="exact or best_effort; null: it started from the beginning")


class JobTransition(Base):
    """The legal moves. A trigger on `jobs` reads this table and refuses every other."""

    __tablename__ = "job_transitions"

    from_state: Mapped[str] = mapped_column(primary_key=True)
    to_state: Mapped[str] = mapped_column(primary_key=True)


class JobEvent(Base):
    __tablename__ = "job_events"
    __table_args__ = (
        CheckConstraint("type IN ('message', 'metrics', 'state')", name="type_known"),
        CheckConstraint("level IN ('info', 'warn', 'error')", name="level_known"),
        Index("ix_job_events_job", "job_id", "id"),
        # A curve is read from this index alone.
        Index(
            "ix_job_events_metrics",
            *("job_id", "fence", "step"),
            postgresql_include=["id", "train_loss", "valid_loss", "learning_rate", "tokens_per_second"],
            postgresql_where=text("step IS NOT NULL"),
        ),
    )

    id: Mapped[Serial]
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"))
    type: Mapped[str]
    level: Mapped[str] = mapped_column(server_default=text("'info'"))
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    fence: Mapped[int | None] = mapped_column(BigInteger)
    created_at: Mapped[Created]
    step: Mapped[int | None] = mapped_column(BigInteger, number_in_metrics("step", "bigint"))
    train_loss: Mapped[float | None] = mapped_column(Double, number_in_metrics("train_loss", "double precision"))
    valid_loss: Mapped[float | None] = mapped_column(Double, number_in_metrics("valid_loss", "double precision"))
    learning_rate: Mapped[float | None] = mapped_column(Double, number_in_metrics("learning_rate", "double precision"))
    tokens_per_second: Mapped[float | None] = mapped_column(
        Double, number_in_metrics("tokens_per_second", "double precision")
    )


class Worker(Base):
    """Who looked for work lately, so that a waiting job can be told whether anybody will come."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    queues: Mapped[list[str]] = mapped_column(ARRAY(String))
    slots: Mapped[int]
    seen_at: Mapped[Created]


class Outbox(Base):
    """Wake-ups to send to Redis, written in the transaction that makes them true."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_pending", "next_at", postgresql_where=text("sent_at IS NULL")),)

    id: Mapped[Serial]
    queue: Mapped[str]
    job_id: Mapped[uuid.UUID]
    created_at: Mapped[Created]
    next_at: Mapped[Created]
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    sent_at: Mapped[Moment | None]


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    scope: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[bytes] = mapped_column(LargeBinary)
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", deferrable=True))
    created_at: Mapped[Created]


class Control(Base):
    """One row: when a reaper last ticked, and until when nobody may be declared dead."""

    __tablename__ = "control"
    __table_args__ = (CheckConstraint("id", name="single_row"),)

    id: Mapped[bool] = mapped_column(primary_key=True, server_default=text("true"))
    reaper_tick: Mapped[Moment | None]
    hold_until: Mapped[Moment | None]
