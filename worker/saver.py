"""Checkpoints as the child sees them: when to save one, and whether a given one can be gone on from. Needs torch."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lora_core.checkpoint import Fingerprint, differences
from lora_core.errors import BadCheckpoint, CheckpointMismatch
from lora_core.state import TrainState, load_checkpoint, save_checkpoint
from lora_core.train import StepReport
from worker.protocol import CheckpointMessage, ResumedMessage
from worker.reporter import Reporter
from worker.task import TrainTask


class Saver:
    """Saves every `seconds`, when the worker drains, and at the end of a run that is long enough to have been saved."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        reporter: Reporter,
        *,
        save_adapter: Callable[[Path], object],
        seconds: float,
        resumed: bool,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._fingerprint = fingerprint
        self._reporter = reporter
        self._save_adapter = save_adapter
        self._seconds = seconds
        self._due = time.monotonic() + seconds
        self._is_long = resumed

    def is_due(self, report: StepReport) -> bool:
        if report.step == report.total_steps and self._is_long:
            return True
        return self._reporter.is_draining or time.monotonic() >= self._due

    def save(self, state: TrainState) -> None:
        """Write `<folder>/<step>/`, with the adapter as it is now, and tell. A full disk costs this checkpoint, not the
        run."""
        self._is_long = True
        try:
            save_checkpoint(self._folder / str(state.step), state, self._fingerprint)
            self._save_adapter(self._folder / str(state.step))
        except OSError as error:
            self._reporter.note(f"No checkpoint was saved at step {state.step}: {error.strerror}.", level="warn")
        else:
            self._reporter.write(CheckpointMessage(step=state.step, metrics=_metrics(state)))
        self._due = time.monotonic() + self._seconds  # from the end: a slow disk must not stop the training


def find_state(
    task: TrainTask, fingerprint: Fingerprint, reporter: Reporter, *, tokens_per_batch: int
) -> TrainState | None:
    """What to go on from, if there is anything, with at most `tokens_per_batch` in memory at once; the supervisor is
    told how exact that is, or why it is not used."""
    if task.resume_from is None:
        return None
    try:
        state, saved = load_checkpoint(task.resume_from)
        found = differences(saved, fingerprint)
    except (BadCheckpoint, CheckpointMismatch) as error:
        reporter.note(f"Training starts from the beginning: {error.message}.", level="warn")
        return None
    if task.halvings and (state.tokens_per_batch is None or state.tokens_per_batch > tokens_per_batch):
        state = replace(state, tokens_per_batch=tokens_per_batch)
        found.append(f"{tokens_per_batch} tokens in memory at once, fewer than before")
    reporter.write(ResumedMessage(step=state.step, differences=found))
    return state


def _metrics(state: TrainState) -> dict[str, float]:
    metrics = {"train_loss": state.train_loss, "valid_loss": state.eval_loss}
    return {name: value for name, value in metrics.items() if value is not None}
