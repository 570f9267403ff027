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
