"""The training task, in the child process: the only module of this room that needs torch."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_core.adapter import has_learned, save_adapter
from lora_core.config import LoraConfig
from lora_core.data import Dataset, tokenize_rows
from lora_core.dpo import DPO, tokenize_preferences
from lora_core.errors import BadConfig, DatasetError
from lora_core.fingerprint import take_fingerprint
from lora_core.inject import eject, inject
from lora_core.model import load_base
from lora_core.rows import read_rows
from lora_core.task import Task, default_task
from lora_core.train import StepReport, TrainConfig, TrainResult, train
from registry.jobs.spec import TrainSpec
from worker.kept_base import KeptBase
from worker.protocol import ResultMessage, StepMessage
from worker.recipe_child import write_recipe
from worker.reporter import Reporter, Stopped
from worker.saver import Saver, find_state
from worker.task import CHECKPOINTS, OUT, TrainTask


def train_adapter(task: TrainTask, workspace: Path, reporter: Reporter, kept: KeptBase | None = None) -> ResultMessage:
    """Train on the task's rows and write the adapter to `out/`. What this process did before changes no bit of it."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    ask_for_repeatable_kernels(wanted=True)
    reporter.phase("loading")
    model, tokenizer = (kept or KeptBase()).get(task.base_digest, lambda: load_base(task.base_dir))
    reporter.phase("tokenizing")
    max_length = min(task.spec.max_length, context_length(model))
    tokenize_all = tokenize_preferences if task.spec.method == "dpo" else tokenize_rows
    read = partial(tokenize_all, tokenizer, max_length=max_length)
    training = tokenize(read, task.training_file, max_length, "training", reporter)
    validation = None
    if task.validation_file is not None:
        validation = tokenize(read, task.validation_file, max_length, "validation", reporter)
    try:
        result, seconds = fit(task, workspace, reporter, model, (training, validation))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reporter.note(f"Not repeatable bit for bit on this device: {str(error)[:200]}", level="warn")
        ask_for_repeatable_kernels(wanted=False)
        eject(model)
        result, seconds = fit(task, workspace, reporter, model, (training, validation))
    if result.stopped:
        raise Stopped
    require_change(model)
    if result.early_stopped:
        reporter.note(why_early(result, task.spec))
    reporter.phase("saving")
    if not save_mergeable(model, task, workspace / OUT):
        reporter.note("This adapter cannot be merged into its base; the worker's log says why.")
    return ResultMessage(metrics=summarize(result, training, seconds), trained_tokens=result.trained_tokens)


def fit(
    task: TrainTask, workspace: Path, reporter: Reporter, model: Any, data: tuple[Dataset, Dataset | None]
) -> tuple[TrainResult, float]:
    """Put the adapter into the model and train it, from where it was last; and the seconds that took."""
    training, validation = data
    config = adapter_config(task)
    inject(model, config, seed=task.spec.seed, on_layer=reporter.alive)
    settings = train_config(task.spec)
    goal = goal_of(task.spec, model)
    fingerprint = take_fingerprint(model, training.examples, settings, base_digest=task.base_digest, task=goal)
    # Not part of what makes it this run: after running out of memory it goes on in smaller pieces.
    tokens_per_batch = max(1, settings.tokens_per_batch >> task.halvings)
    state = find_state(task, fingerprint, reporter, tokens_per_batch=tokens_per_batch)
    saver = Saver(
        workspace / CHECKPOINTS,
        fingerprint,
        reporter,
        save_adapter=partial(save_mergeable, model, task),
        seconds=task.checkpoint_seconds,
        resumed=bool(state),
    )
    reporter.phase("training")
    started = time.monotonic()
    result = train(
        model,
        training.examples,
        replace(settings, tokens_per_batch=tokens_per_batch),
        task=goal,
        eval_examples=validation.examples if validation else None,
        on_step=step_teller(reporter, started, first=state.step if state else 0),
        should_stop=reporter.is_stopped,
        resume_from=state,
        on_checkpoint=saver.save,
        should_checkpoint=saver.is_due,
    )
    return result, time.monotonic() - started


def save_mergeable(model: Any, task: TrainTask, folder: Path) -> bool:
    """Write the adapter as it is now, and its merge recipe beside it; whether it has one."""
    save_adapter(model, adapter_config(task), folder)
    return write_recipe(task.base_dir, folder)


def ask_for_repeatable_kernels(*, wanted: bool) -> None:
    """On CUDA, kernels that give equal bits for equal inputs, which may be slower. On a CPU all of them do."""
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(wanted)
        # It costs time, and nothing here reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by a metaclass
        torch.backends.cudnn.benchmark = False


def context_length(model: Any) -> int:
    """The longest row the model was built for, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def tokenize(read: Callable[..., Dataset], path: Path, max_length: int, what: str, reporter: Reporter) -> Dataset:
    """The rows of a file as examples; tells how many were cut or left out."""
    try:
        with path.open("rb") as lines:
            dataset = read(read_rows(lines))
    except DatasetError as error:
        raise type(error)(f"The {what} file cannot be used: {error.message}", **error.details) from error
    told = f"{len(dataset.examples)} {what} rows"
    if dataset.truncated:
        told += f"; {dataset.truncated} were cut to {max_length} tokens"
    if dataset.skipped:
        told += f"; {dataset.skipped} were left out, as their answers begin after {max_length} tokens"
    reporter.note(f"{told}.")
    return dataset


def adapter_config(task: TrainTask) -> LoraConfig:
    """What goes into adapter_config.json: the base by its name in the catalogue, never by a path."""
    return replace(task.spec.lora.config(), base_model_name_or_path=task.base_model, revision=task.revision)


def goal_of(spec: TrainSpec, model: Any) -> Task:
    """What the run learns."""
    return DPO(spec.beta) if spec.method == "dpo" else default_task(model, packing=spec.packing)


def train_config(spec: TrainSpec) -> TrainConfig:
    return TrainConfig(
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        max_steps=spec.max_steps,
        learning_rate=spec.learning_rate,
        loraplus_lr_ratio=spec.loraplus_lr_ratio,
        lr_scheduler_type=spec.lr_scheduler_type,
        warmup_ratio=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        eval_steps=spec.eval_steps,
        early_stopping_patience=spec.early_stopping_patience,
        tokens_per_batch=spec.tokens_per_batch,
        packing=spec.packing,
        activation_checkpointing=spec.activation_checkpointing,
    )


def step_teller(reporter: Reporter, started: float, *, first: int) -> Callable[[StepReport], None]:
    """Tells every step to the supervisor. `first` steps were done before `started`."""

    def tell(report: StepReport) -> None:
        elapsed = time.monotonic() - started
        reporter.step(
            StepMessage(
                step=report.step,
                total_steps=report.total_steps,
                loss=report.loss,
                learning_rate=report.lr,
                grad_norm=report.grad_norm,
                tokens_per_second=report.tokens_per_second,
                eta_seconds=elapsed / (report.step - first) * (report.total_steps - report.step),
                valid_loss=report.eval_loss,
            )
        )

    return tell


def require_change(model: Any) -> None:
    """BadConfig if training changed nothing: such an adapter is the base model under another name."""
    if not has_learned(model):
        raise BadConfig("training changed nothing: use a higher learning_rate, more steps or less warmup")


def why_early(result: TrainResult, spec: TrainSpec) -> str:
    """A sentence for who wonders at a run that ended before its last step."""
    count = f"{spec.early_stopping_patience} evaluation{'s' if spec.early_stopping_patience != 1 else ''} in a row"
    return (
        f"Training ended early, after step {result.steps} of {result.total_steps}: {count} brought no validation loss "
        f"below the best, {result.best_eval_loss:.4f}; the last was {result.eval_loss:.4f}. "
        f"The adapter is that of step {result.steps}."
    )


def summarize(result: TrainResult, training: Dataset, seconds: float) -> dict[str, float]:
    metrics: dict[str, float | None] = {
        "steps": result.steps,
        "total_steps": result.total_steps,
        "examples": len(training.examples),
        "train_loss": result.train_loss,
        "valid_loss": result.eval_loss,
        "best_valid_loss": result.best_eval_loss,
        "early_stopped": 1.0 if result.early_stopped else None,
        "seconds": seconds,
    }
    return {name: value for name, value in metrics.items() if value is not None}
