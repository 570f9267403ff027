"""What the API answers, as far as the commands read it; `--json` prints the server's own words."""

from typing import Any, NotRequired, TypedDict


class StoredFile(TypedDict):
    """One file of an artifact, named by its SHA-256."""

    path: str
    bytes: int
    sha256: str


class FileInfo(TypedDict):
    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    report: dict[str, Any] | None


class BaseModelInfo(TypedDict):
    name: str
    source: str
    revision: str | None
    architecture: str
    dtype: str
    parameters: int
    digest: str
    files: list[StoredFile]
    created_at: int


class Failure(TypedDict):
    code: str
    message: str
    suggested_patch: NotRequired[list[dict[str, Any]] | None]


class Job(TypedDict):
    id: str
    model: str
    adapter: str
    version: int | None
    fine_tuned_model: str | None
    state: str
    progress: dict[str, Any] | None
    error: Failure | None
    created_at: int
    finished_at: int | None


class QueueInfo(TypedDict):
    """Where a job stands in its queue."""

    id: str
    state: str
    queue: str
    priority: int
    position: int | None
    reason: str | None
    message: str | None
    estimate_seconds: int | None


class Attempt(TypedDict):
    """One time that a worker took a job."""

    attempt: int
    worker: str
    started_at: int
    ended_at: int | None
    ending: str | None
    error: Failure | None
    last_step: int | None
    resume: str | None


class Checkpoint(TypedDict):
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]
    bytes: int
    files: list["StoredFile"]
    version: int | None


class Webhook(TypedDict):
    id: str
    name: str
    url: str
    event_types: list[str]
    created_at: int


class Event(TypedDict):
    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class Adapter(TypedDict):
    name: str
    base_model: str
    latest_version: int | None
    aliases: dict[str, int]
    created_at: int


class Version(TypedDict):
    adapter: str
    version: int
    ref: str
    aliases: list[str]
    base_model: str
    digest: str
    job_id: str
    metrics: dict[str, Any] | None
    lora: dict[str, Any]
    files: list[StoredFile]
    created_at: int


class Alias(TypedDict):
    adapter: str
    alias: str
    version: int


class Merge(TypedDict):
    id: str
    adapter: str
    version: int
    dtype: str
    status: str
    progress: dict[str, Any] | None
    error: Failure | None
    digest: str | None
    files: list[StoredFile]


class MergedFile(TypedDict):
    path: str
    bytes: int
    sha256: str | None


class Merged(TypedDict):
    """A merged checkpoint that may never have been stored."""

    files: list[MergedFile]


ENDED = frozenset({"succeeded", "failed", "cancelled"})
