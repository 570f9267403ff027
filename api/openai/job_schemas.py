"""What this service tells of a job beyond OpenAI's objects."""

from typing import Literal

from pydantic import BaseModel

from api.schemas import shown

ATTEMPT = {
    "id": "attempt-2",
    "object": "fine_tuning.job.attempt",
    "attempt": 2,
    "fence": 118,
    "worker": "gpu-7:4211:1f0c2d9a",
    "started_at": 1790000004,
    "ended_at": 1790000064,
    "ending": "lost",
    "error": {
        "class": "infra",
        "code": "worker_lost",
        "message": "The worker that ran this job stopped answering.",
    },
    "last_step": 120,
    "resume": "exact",
}


QUEUE = {
    "id": "ftjob-0f5c3a1e8d7b4c62a9f01b2c3d4e5f60",
    "object": "fine_tuning.job.queue",
    "state": "queued",
    "queue": "default",
    "priority": 100,
    "position": 3,
    "reason": "waiting_for_worker",
    "message": "2 of 2 worker slots are busy; 2 jobs come first.",
    "until": None,
    "estimate_seconds": 340,
}


class QueueObject(BaseModel):
    """Where a job stands in its queue. `position` and `reason` are null unless it waits."""

    model_config = shown(QUEUE)

    id: str
    object: Literal["fine_tuning.job.queue"] = "fine_tuning.job.queue"
    state: str
    queue: str
    priority: int
    position: int | None
    reason: Literal["paused", "backoff", "no_worker", "tenant_limit", "waiting_for_worker"] | None
    message: str | None
    until: int | None
    estimate_seconds: int | None


POINT = {
    "step": 20,
    "count": 2,
    "train_loss": {"min": 1.712, "max": 1.834, "last": 1.712},
    "valid_loss": None,
    "learning_rate": 1.5e-4,
    "tokens_per_second": 5120.5,
}


class MetricsSpread(BaseModel):
    """What a number was among the steps that share a point."""

    min: float
    max: float
    last: float


class MetricsPoint(BaseModel):
    """`count` measurements up to and including `step`; speed is their mean."""

    step: int
    count: int
    train_loss: MetricsSpread | None
    valid_loss: MetricsSpread | None
    learning_rate: float | None
    tokens_per_second: float | None


class MetricsObject(BaseModel):
    """A job's curves by step. What a lost attempt had told beyond the step its successor began at is not in them."""

    model_config = shown(
        {"id": "ftjob-0f5c3a1e8d7b4c62a9f01b2c3d4e5f60", "object": "fine_tuning.job.metrics", "points": [POINT]}
    )

    id: str
    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    points: list[MetricsPoint]


class AttemptError(BaseModel):
    """Why an attempt ended; `class` decides whether another one starts."""

    class_: str
    code: str | None
    message: str | None

    model_config = {"serialize_by_alias": True, "alias_generator": lambda name: name.rstrip("_")}


class AttemptObject(BaseModel):
    """One claim of a job by a worker. `ending` is null while it runs; `resume` is null when it began at step 0."""

    model_config = shown(ATTEMPT)

    id: str
    object: Literal["fine_tuning.job.attempt"] = "fine_tuning.job.attempt"
    attempt: int
    fence: int
    worker: str
    started_at: int
    ended_at: int | None
    ending: Literal["succeeded", "failed", "cancelled", "released", "lost"] | None
    error: AttemptError | None
    last_step: int | None
    resume: Literal["exact", "best_effort"] | None
