"""The training loop: AdamW on whatever is unfrozen, loss averaged over targets. No files, no network."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.batching import epoch_steps, micro_batches
from lora_core.errors import BadConfig, CheckpointMismatch, NoGradient, TrainingDiverged
from lora_core.schedule import Schedule, lr_factor
from lora_core.state import TrainState, capture_tensors, restore_tensors
from lora_core.task import CAUSAL_LM, Task
from lora_core.trainable import trained_parameters


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`batch_size` rows make one optimizer step; `tokens_per_batch` bounds what is in memory at once."""

    n_epochs: int = 1
    batch_size: int = 8
    max_steps: int | None = None
    learning_rate: float = 2e-4
    lr_scheduler_type: Schedule = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 turns clipping off
    seed: int = 0
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        for name in ("n_epochs", "batch_size", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise BadConfig(f"{name} must be at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise BadConfig("max_steps must be at least 1")
        if not 0 < self.learning_rate <= 1:
            raise BadConfig("learning_rate must be above 0 and at most 1")
        if self.lr_scheduler_type not in ("linear", "cosine", "constant"):
            raise BadConfig('lr_scheduler_type must be "linear", "cosine" or "constant"')
        if not 0 <= self.warmup_ratio <= 1 or not 0 <= self.weight_decay <= 1:
            raise BadConfig("warmup_ratio and weight_decay must be from 0 to 1")
        if not 0 <= self.max_grad_norm < math.inf:
            raise BadConfig("max_grad_norm must be 0 (off) or above")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is per labelled token; `grad_norm` is before clipping; `tokens` counts input
    tokens without padding; `eval_loss` is set after the last step of each epoch."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    eval_loss: float | None


@dataclass(frozen=True)
class TrainResult:
    """`train_loss` and `eval_loss` are the last ones; `stopped` says that `should_stop` ended it early."""

    steps: int
    total_steps: int
    train_loss: float | None
    eval_loss: float | None
    trained_tokens: int
    stopped: bool


def train(
    model: Any,
    examples: Sequence[Any],
    config: TrainConfig,
    *,
    task: Task = CAUSAL_LM,
    eval_examples: Sequence[Any] | None = None,
    after_step: Callable[[int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume_from: TrainState | None = None,
    on_checkpoint: Callable[[TrainState], None] | None = None,
    should_checkpoint: Callable[[StepReport], bool] = lambda _: True,
) -> TrainResult:
    """Train every unfrozen parameter of `model` in place; equal inputs on equal hardware give equal bits.

    `after_step` is called with the step's number while its gradients are still there. After each step: `on_step`,
    then `on_checkpoint` if `should_checkpoint`, then `should_stop`. Whoever goes on with `resume_from`, a state of
    the same run, gets the bits of the run that was never interrupted.
    TrainingDiverged if the loss or a gradient is not finite; NoGradient if a parameter is out of the loss's reach.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # dropout
        model.train()
        try:
            run = _Run(model, examples, config, task, after_step)
            if resume_from is not None:
                run.restore(resume_from)
            return run.run(eval_examples, on_step, should_stop, on_checkpoint, should_checkpoint)
        finally:
            model.eval()


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Any], *, task: Task = CAUSAL_LM, tokens_per_batch: int = 4096) -> float:
    """Mean loss per target. The model's mode is kept."""
    was_training = model.training
    model.eval()
    lengths = [task.length(example) for example in examples]
    total = 0.0
    for piece in micro_batches(range(len(examples)), lengths, max_tokens=tokens_per_batch):
        total += task.loss_sum(model, task.collate([examples[row] for row in piece], model.device)).item()
    model.train(was_training)
    return total / sum(task.targets(example) for example in examples)


class _Run:
    def __init__(
        self,
        model: Any,
        examples: Sequence[Any],
        config: TrainConfig,
        task: Task,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.model = model
        self.examples = examples
        self.config = config
        self.task = task
        self.after_step = after_step
        self.lengths = [task.length(example) for example in examples]
        self.parameters = list(trained_parameters(model).values())
        if not self.parameters:
            raise NoGradient("the model has nothing to train", modules=[])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total_steps = min(config.n_epochs * self.steps_per_epoch, config.max_steps or 2**62)
        self.done = self.trained_tokens = 0
        self.train_loss: float | None = None
        self.eval_loss: float | None = None

    def restore(self, state: TrainState) -> None:
        if not 1 <= state.step <= self.total_steps:
            raise CheckpointMismatch(f"the checkpoint is of step {state.step}, the run has {self.total_steps}")
        restore_tensors(state.tensors, self.model, self.optimizer)
        self.done, self.trained_tokens = state.step, state.trained_tokens
        self.train_loss, self.eval_loss = state.train_loss, state.eval_loss

    def capture(self) -> TrainState:
        tensors = capture_tensors(self.model, self.optimizer)
        return TrainState(self.done, self.trained_tokens, self.train_loss, self.eval_loss, tensors)

    def run(
        self,
        eval_examples: Sequence[Any] | None,
        on_step: Callable[[StepReport], None] | None,
        should_stop: Callable[[], bool] | None,
        on_checkpoint: Callable[[TrainState], None] | None,
        should_checkpoint: Callable[[StepReport], bool],
    ) -> TrainResult:
        for rows in self._steps():
            if should_stop and should_stop():
                break
            report = self._advance(rows, eval_examples)
            if on_step:
                on_step(report)
            if on_checkpoint and should_checkpoint(report):
                on_checkpoint(self.capture())
        return TrainResult(
            steps=self.done,
            total_steps=self.total_steps,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            trained_tokens=self.trained_tokens,
            stopped=self.done < self.total_steps,
        )

    def _steps(self) -> Iterator[list[int]]:
        """The rows of every step that is not done yet; found from their place in the epoch, nothing is replayed."""
        while self.done < self.total_steps:
            epoch, first = divmod(self.done, self.steps_per_epoch)
            steps = epoch_steps(self.lengths, seed=self.config.seed, epoch=epoch, batch_size=self.config.batch_size)
            yield from steps[first : first + self.total_steps - self.done]

    def _advance(self, rows: list[int], eval_examples: Sequence[Any] | None) -> StepReport:
        """One optimizer step, and an evaluation when an epoch or the run ends with it."""
        step = self.done + 1
        started = time.perf_counter()
        self.train_loss, lr, grad_norm = self._step(step, rows)
        seconds = time.perf_counter() - started
        tokens = sum(self.lengths[row] for row in rows)
        self.trained_tokens += tokens
        self.done = step
        due = step % self.steps_per_epoch == 0 or step == self.total_steps
        if due and eval_examples:
            limit = self.config.tokens_per_batch
            self.eval_loss = evaluate(self.model, eval_examples, task=self.task, tokens_per_batch=limit)
        return StepReport(
            step=step,
            total_steps=self.total_steps,
            epoch=step / self.steps_per_epoch,
            loss=self.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            eval_loss=self.eval_loss if due else None,
        )

    def _step(self, step: int, rows: list[int]) -> tuple[float, float, float]:
        """One optimizer step over `rows`; returns (loss, lr, grad_norm)."""
        # Averaged over the targets of the step, not over micro-batches, whose sizes differ.
        targets = sum(self.task.targets(self.examples[row]) for row in rows)
        loss = 0.0
        for piece in micro_batches(rows, self.lengths, max_tokens=self.config.tokens_per_batch):
            batch = self.task.collate([self.examples[row] for row in piece], self.model.device)
            share = self.task.loss_sum(self.model, batch) / targets
            loss += share.item()
            if not math.isfinite(loss):
                raise TrainingDiverged(f"the loss is {loss} at step {step}; lower the learning rate", step=step)
            share.backward()
        if step == 1:
            _require_gradients(self.model)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient is {norm} at step {step}; lower the learning rate", step=step)
        lr = self.config.learning_rate * self._factor(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.after_step:
            self.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, lr, norm

    def _factor(self, step: int) -> float:
        warmup = math.ceil(self.config.warmup_ratio * self.total_steps)
        return lr_factor(step, total=self.total_steps, warmup=warmup, schedule=self.config.lr_scheduler_type)


def _require_gradients(model: nn.Module) -> None:
    # A factor that the loss does not reach would be published at its start values.
    without = [name for name, parameter in trained_parameters(model).items() if parameter.grad is None]
    if without:
        raise NoGradient(f"no gradient reaches {', '.join(without[:5])}", modules=without)
