"""A training job from claim to published version."""

from functools import partial
from pathlib import Path

from registry.jobs.inputs import train_inputs
from registry.models import Job
from worker.attempt import Attempt
from worker.heart import Heart
from worker.host import Host
from worker.inputs import fetch_base, fetch_checkpoint, fetch_file, read_inputs
from worker.keeper import keep_checkpoints
from worker.publish import describe_adapter, publish_adapter
from worker.run_task import run_task
from worker.task import CHECKPOINTS, OUT, TrainTask


def run_train(host: Host, attempt: Attempt, heart: Heart, job: Job, workspace: Path) -> None:
    """Fetch base and data, train in a child process, check, store and publish the adapter."""
    inputs = read_inputs(host, attempt, job, train_inputs)
    attempt.news.phase("fetching")
    base_dir = fetch_base(host, attempt, inputs.base)
    training_file = fetch_file(host, attempt, inputs.training, workspace / "train.jsonl")
    validation_file = None
    if inputs.validation is not None:
        validation_file = fetch_file(host, attempt, inputs.validation, workspace / "valid.jsonl")
    task = TrainTask(
        base_dir=base_dir,
        base_digest=inputs.base.digest,
        base_model=inputs.base.name,
        revision=inputs.base.revision,
        training_file=training_file,
        validation_file=validation_file,
        spec=inputs.spec,
        resume_from=fetch_checkpoint(host, attempt, job, workspace / "resume"),
        checkpoint_seconds=host.checkpoint_seconds,
        threads=host.threads,
        halvings=inputs.halvings,
        stay=host.warm.keeps,
    )
    with keep_checkpoints(host, attempt, workspace / CHECKPOINTS, partial(describe_adapter, inputs)) as keeper:
        result = run_task(host, attempt, task, workspace, base_digest=inputs.base.digest, on_checkpoint=keeper.hear)
    publish_adapter(host, attempt, heart, inputs, out=workspace / OUT, result=result)
