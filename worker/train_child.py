"""The training task, in the child process. Needs torch."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_core.data import Dataset, tokenize_rows
from lora_core.dpo import tokenize_preferences
from lora_core.errors import DatasetError
from lora_core.fingerprint import take_fingerprint
from lora_core.inject import eject, inject
from lora_core.model import load_base
from lora_core.qlora import quantise_base
from lora_core.rows import read_rows
from lora_core.train import StepReport, TrainResult, train
from registry.jobs.spec import TrainSpec
from worker.adapter_child import TrainedAdapter, adapter_config, train_config
from worker.kept_base import KeptBase
from worker.protocol import ResultMessage, StepMessage
from worker.reporter import Reporter, Stopped
from worker.saver import Saver, find_state
from worker.task import CHECKPOINTS, OUT, TrainTask


def train_adapter(task: TrainTask, workspace: Path, reporter: Reporter, kept: KeptBase | None = None) -> ResultMessage:
    """Train on the task's rows and write the adapter to `out/`. What this process did before changes no bit of it."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    ask_for_repeatable_kernels(wanted=True)
    reporter.phase("loading")
    model, tokenizer = (kept or KeptBase()).get(base_key(task), lambda: load_frozen(task))
    reporter.phase("tokenizing")
    max_length = min(task.spec.max_length, context_length(model))
    tokenize_all = tokenize_preferences if task.spec.method == "dpo" else tokenize_rows
    read = partial(tokenize_all, tokenizer, max_length=max_length)
    training = tokenize(read, task.training_file, max_length, "training", reporter)
    validation = None
    if task.validation_file is not None:
        validation = tokenize(read, task.validation_file, max_length, "validation", reporter)
    try:
        adapter, result, seconds = fit(task, workspace, reporter, model, (training, validation))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reporter.note(f"Not repeatable bit for bit on this device: {str(error)[:200]}", level="warn")
        ask_for_repeatable_kernels(wanted=False)
        eject(model)
        adapter, result, seconds = fit(task, workspace, reporter, model, (training, validation))
    if result.stopped:
        raise Stopped
    adapter.require_change()
    if result.early_stopped:
        reporter.note(why_early(result, task.spec))
    reporter.phase("saving")
    if not adapter.save(workspace / OUT):
        reporter.note("This adapter cannot be merged into its base; the worker's log says why.")
    return ResultMessage(metrics=summarize(result, training, seconds), trained_tokens=result.trained_tokens)


def base_key(task: TrainTask) -> object:
    """What names the base that `load_frozen` loads: another key, another base."""
    return task.base_digest, task.spec.lora.quantization


def load_frozen(task: TrainTask) -> tuple[Any, Any]:
    """(model, tokenizer); the model in 4 bits where the job asks for that."""
    model, tokenizer = load_base(task.base_dir)
    if task.spec.lora.quantization == "nf4":
        quantise_base(model)
    return model, tokenizer


def fit(
    task: TrainTask, workspace: Path, reporter: Reporter, model: Any, data: tuple[Dataset, Dataset | None]
) -> tuple[TrainedAdapter, TrainResult, float]:
    """Put the adapter into the model and train it, from where it was last; and the seconds that took."""
    training, validation = data
    config = adapter_config(task, rows=len(training.examples))
    inject(model, config, seed=task.spec.seed, on_layer=reporter.alive)
    adapter = TrainedAdapter(model, config, task)
    settings = train_config(task.spec)
    fingerprint = take_fingerprint(model, training.examples, settings, base_digest=task.base_digest, task=adapter.goal)
    # Not part of what makes it this run: after running out of memory it goes on in smaller pieces.
    tokens_per_batch = max(1, settings.tokens_per_batch >> task.halvings)
    state = find_state(task, fingerprint, reporter, tokens_per_batch=tokens_per_batch)
    saver = Saver(
        workspace / CHECKPOINTS,
        fingerprint,
        reporter,
        save_adapter=adapter.save,
        seconds=task.checkpoint_seconds,
        resumed=bool(state),
    )
    reporter.phase("training")
    started = time.monotonic()
    result = train(
        model,
        training.examples,
        replace(settings, tokens_per_batch=tokens_per_batch),
        task=adapter.goal,
        eval_examples=validation.examples if validation else None,
        after_step=adapter.after_step,
        on_step=step_teller(reporter, started, first=state.step if state else 0),
        should_stop=reporter.is_stopped,
        resume_from=state,
        on_checkpoint=saver.save,
        should_checkpoint=saver.is_due,
    )
    return adapter, result, time.monotonic() - started


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
