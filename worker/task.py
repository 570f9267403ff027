"""What a supervisor writes into a child's workspace: the whole of what the child is told."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from registry.jobs.spec import MergeOptions, TrainSpec

TASK_FILE = "task.json"
OUT = "out"
CHECKPOINTS = "checkpoints"


class TrainTask(BaseModel):
    """Train an adapter on `training_file` and leave it in `out/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["train"] = "train"
    base_dir: Path
    base_digest: str
    base_model: str  # its name in the catalogue; goes into adapter_config.json
    revision: str | None
    training_file: Path
    validation_file: Path | None
    spec: TrainSpec
    resume_from: Path | None  # a folder with a checkpoint of this job
    checkpoint_seconds: float
    threads: int
    halvings: int = 0  # of what is in memory at once, after the machine ran out of it
    stay: bool = False  # keep the base afterwards, for another task


class MergeTask(BaseModel):
    """Fold the adapter into the base and leave the model in `out/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["merge"] = "merge"
    base_dir: Path
    adapter_dir: Path
    recipe_file: Path | None = None
    options: MergeOptions


class CanaryTask(BaseModel):
    """Compare the model in `out/` with what it was merged from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["canary"] = "canary"
    merge: MergeTask


Task = TrainTask | MergeTask | CanaryTask
_PARSER: TypeAdapter[Task] = TypeAdapter(Annotated[Task, Field(discriminator="kind")])


def write_task(workspace: Path, task: Task) -> None:
    (workspace / TASK_FILE).write_text(task.model_dump_json())


def read_task(workspace: Path) -> Task:
    return _PARSER.validate_json((workspace / TASK_FILE).read_bytes())
