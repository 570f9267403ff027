"""OpenAI's objects, as its own clients read them; what this service adds stands beside, never instead."""

from typing import Any, Literal

from pydantic import BaseModel

from api.schemas import STORED, StoredObject, shown

_FILE_ID = "file-6b1f0c2d9a7e4f53b8d21c0a9e4f7d13"
_JOB_ID = "ftjob-0f5c3a1e8d7b4c62a9f01b2c3d4e5f60"
FILE = {
    "id": _FILE_ID,
    "object": "file",
    "bytes": 18230,
    "created_at": 1790000000,
    "expires_at": None,
    "filename": "rows.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
    "sha256": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9",
    "report": {"rows": 120, "kind": "messages"},
}
_HYPERPARAMETERS = {"batch_size": 8, "learning_rate_multiplier": 1.0, "n_epochs": 3}
JOB = {
    "id": _JOB_ID,
    "object": "fine_tuning.job",
    "created_at": 1790000000,
    "started_at": 1790000004,
    "finished_at": 1790000104,
    "model": "Qwen/Qwen3-0.6B",
    "fine_tuned_model": "support-bot@7",
    "organization_id": "org-1c9d2e3f4a5b4c6d8e7f0a1b2c3d4e5f",
    "status": "succeeded",
    "state": "succeeded",
    "training_file": _FILE_ID,
    "validation_file": None,
    "result_files": [],
    "hyperparameters": _HYPERPARAMETERS,
    "method": {"type": "supervised", "supervised": {"hyperparameters": _HYPERPARAMETERS}},
    "trained_tokens": 40960,
    "error": None,
    "seed": 42,
    "estimated_finish": None,
    "integrations": [],
    "metadata": {"team": "support"},
    "adapter": "support-bot",
    "version": 7,
    "lora": {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "target_modules": "all-linear", "use_rslora": False},
    "progress": {"step": 45, "steps": 45},
    "attempt": 1,
    "retry_of": None,
    "depot": {"queue": "default", "priority": 100, "deadline_seconds": 604800, "deadline_at": None},
}
EVENT = {
    "id": "ftevent-42",
    "object": "fine_tuning.job.event",
    "created_at": 1790000050,
    "level": "info",
    "message": "Step 20 of 45: loss 1.834",
    "type": "metrics",
    "data": {"step": 20, "train_loss": 1.834},
}
CHECKPOINT = {
    "id": "ftckpt-3d5c7e9f1a2b4c6d8e0f1a2b3c4d5e6f",
    "object": "fine_tuning.job.checkpoint",
    "created_at": 1790000060,
    "fine_tuned_model_checkpoint": "support-bot:ckpt-step-30",
    "fine_tuning_job_id": _JOB_ID,
    "step_number": 30,
    "metrics": {"step": 30, "train_loss": 1.612, "valid_loss": 1.704},
    "bytes": 3145728,
    "files": [STORED],
    "version": None,
}
MODEL = {"id": "support-bot@7", "object": "model", "created": 1790000104, "owned_by": "depot", "shutdown_date": None}


class FileObject(BaseModel):
    """An uploaded file. `status` is always `processed`: a bad file is refused at upload."""

    model_config = shown(FILE)

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    sha256: str
    report: dict[str, Any] | None


class FileDeleted(BaseModel):
    model_config = shown({"id": _FILE_ID, "object": "file", "deleted": True})

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Hyperparameters(BaseModel):
    """The numbers in use; `auto` is already resolved."""

    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int


class Supervised(BaseModel):
    hyperparameters: Hyperparameters


class DpoHyperparameters(Hyperparameters):
    beta: float


class Dpo(BaseModel):
    hyperparameters: DpoHyperparameters


class Method(BaseModel):
    """How the model is trained; the settings of the other method are null."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class JobError(BaseModel):
    """Why the job failed. `suggested_patch` is a JSON Patch on its request, where a rule knows what may help; send it
    with `POST /v1/fine_tuning/jobs/{id}/retry`."""

    code: str
    message: str
    param: str | None = None
    suggested_patch: list[dict[str, Any]] | None = None


class Scheduling(BaseModel):
    """How the job waits; `deadline_at` is null unless it does."""

    queue: str
    priority: int
    deadline_seconds: int
    deadline_at: int | None


class JobObject(BaseModel):
    """OpenAI's job, plus `state`, `lora`, `adapter`, `version`, `progress`, `attempt` and `depot`."""

    model_config = shown(JOB)

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    state: Literal["queued", "paused", "running", "pausing", "cancelling", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str] = []
    hyperparameters: Hyperparameters
    method: Method
    trained_tokens: int | None
    error: JobError | None
    seed: int
    estimated_finish: int | None = None
    integrations: list[Any] = []
    metadata: dict[str, str] | None
    adapter: str
    version: int | None
    lora: dict[str, Any]
    progress: dict[str, Any] | None
    attempt: int
    retry_of: str | None
    depot: Scheduling


class EventObject(BaseModel):
    """One line of a job's log, or one point of its curves. Besides OpenAI's types there is `state`."""

    model_config = shown(EVENT)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics", "state"]
    data: dict[str, Any] | None


class CheckpointMetrics(BaseModel):
    """How training stood at the checkpoint."""

    step: int
    train_loss: float | None
    valid_loss: float | None


class CheckpointObject(BaseModel):
    """Where an interrupted job goes on from, and the adapter as it was then: `files`, none while training had changed
    nothing. The name tells people which one it is; it is `name@7`, and `version` 7, once it was published."""

    model_config = shown(CHECKPOINT)

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    bytes: int
    files: list[StoredObject]
    version: int | None


class ModelObject(BaseModel):
    """A base model, or a published version of an adapter as `name@7`."""

    model_config = shown(MODEL)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None


class ModelList(BaseModel):
    """Not paged, as OpenAI's is not: base models, then the latest version of each adapter, 1 000 of each at most."""

    model_config = shown({"object": "list", "data": [MODEL]})

    object: Literal["list"] = "list"
    data: list[ModelObject]
