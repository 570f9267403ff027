"""The training loop: AdamW on whatever is unfrozen, loss averaged over targets. No files, no network."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_core import distributed
from lora_core.batching import epoch_steps, micro_batches
from lora_core.errors import BadConfig, CheckpointMismatch, NoGradient, TrainingDiverged
from lora_core.evaluation import evaluate
from lora_core.mode import training
from lora_core.optimizer import make_optimizer, set_rate
from lora_core.pressure import is_out_of_memory, release
from lora_core.schedule import lr_factor
from lora_core.state import TrainState, capture_tensors, restore_tensors, rng_state, set_rng_state
from lora_core.task import Task, default_task, packs
from lora_core.train_config import TrainConfig
from lora_core.trainable import trained_parameters

__all__ = ["StepReport", "TrainConfig", "TrainResult", "evaluate", "train"]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` is per target; `grad_norm` is before clipping; `tokens` counts input tokens without
    padding; `tokens_per_batch` is the limit in force, lower than asked for once memory has run out; `eval_loss` is
    set where an evaluation was due."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    tokens_per_batch: int
    eval_loss: float | None


@dataclass(frozen=True)
class TrainResult:
    """`train_loss` and `eval_loss` are the last ones, whatever `best_eval_loss` was; `stopped` says that `should_stop`
    ended it, `early_stopped` that its evaluations did."""

    steps: int
    total_steps: int
    train_loss: float | None
    eval_loss: float | None
    trained_tokens: int
    stopped: bool
    early_stopped: bool
    best_eval_loss: float | None


def train(
    model: Any,
    examples: Sequence[Any],
    config: TrainConfig,
    *,
    task: Task | None = None,
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
    the same run, gets the bits of the run that was never interrupted. Without `task`, a causal language model.
    Memory that runs out in a step is answered by smaller micro-batches, from that step on, at the same rows per step.
    In a process group every process trains on its share of each step; only the first one calls `on_…`.
    TrainingDiverged if the loss or a gradient is not finite; NoGradient if a parameter is out of the loss's reach.
    """
    if config.early_stopping_patience is not None and not eval_examples:
        raise BadConfig("early_stopping_patience needs rows to evaluate on")
    task = task or default_task(model, packing=config.packing)
    with torch.random.fork_rng(), training(model, config, packed=packs(task)) as forget:
        torch.manual_seed(config.seed)  # dropout
        run = _Run(model, examples, eval_examples, config, task, after_step, forget)
        if resume_from is not None:
            run.restore(resume_from)
        return run.run(on_step, should_stop, on_checkpoint, should_checkpoint)


class _Run:
    def __init__(  # noqa: PLR0917  what train is given, in its order
        self,
        model: Any,
        examples: Sequence[Any],
        eval_examples: Sequence[Any] | None,
        config: TrainConfig,
        task: Task,
        after_step: Callable[[int], None] | None,
        forget: Callable[[], None],
    ) -> None:
        self.model = model
        self.examples = examples
        self.eval_examples = eval_examples
        self.config = config
        self.task = task
        self.after_step, self.forget = after_step, forget
        self.lengths = [task.length(example) for example in examples]
        held_out = [task.length(example) for example in eval_examples or ()]
        distributed.require_equal((config, self.lengths, held_out), "rows or settings")
        named = trained_parameters(model)
        if not named:
            raise NoGradient("the model has nothing to train", modules=[])
        self.parameters = list(named.values())
        self.optimizer = make_optimizer(named, config)
        self.steps_per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total_steps = min(config.n_epochs * self.steps_per_epoch, config.max_steps or 2**62)
        self.done = self.trained_tokens = 0
        self.tokens_per_batch = config.tokens_per_batch
        self.train_loss: float | None = None
        self.eval_loss: float | None = None
        self.best_eval_loss: float | None = None
        self.evaluations_since_best = 0

    def restore(self, state: TrainState) -> None:
        if not 1 <= state.step <= self.total_steps:
            raise CheckpointMismatch(f"the checkpoint is of step {state.step}, the run has {self.total_steps}")
        restore_tensors(state.tensors, self.model, self.optimizer)
        self.done, self.trained_tokens = state.step, state.trained_tokens
        self.train_loss, self.eval_loss = state.train_loss, state.eval_loss
        self.best_eval_loss, self.evaluations_since_best = state.best_eval_loss, state.evaluations_since_best
        self.tokens_per_batch = state.tokens_per_batch or self.tokens_per_batch

    def capture(self) -> TrainState:
        return TrainState(
            step=self.done,
            trained_tokens=self.trained_tokens,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            tensors=capture_tensors(self.model, self.optimizer),
            best_eval_loss=self.best_eval_loss,
            evaluations_since_best=self.evaluations_since_best,
            tokens_per_batch=self.tokens_per_batch,
        )

    def run(
        self,
        on_step: Callable[[StepReport], None] | None,
        should_stop: Callable[[], bool] | None,
        on_checkpoint: Callable[[TrainState], None] | None,
        should_checkpoint: Callable[[StepReport], bool],
    ) -> TrainResult:
        first = distributed.rank() == 0
        asked = False
        for rows in self._steps():
            asked = distributed.total(float(should_stop is not None and should_stop()), self.model.device) > 0
            if asked:
                break
            report = self._advance(rows)
            if on_step and first:
                on_step(report)
            if on_checkpoint and first and should_checkpoint(report):
                on_checkpoint(self.capture())
        return TrainResult(
            steps=self.done,
            total_steps=self.total_steps,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            trained_tokens=self.trained_tokens,
            stopped=asked,
            early_stopped=self._is_stale() and self.done < self.total_steps,
            best_eval_loss=self.best_eval_loss,
        )

    def _steps(self) -> Iterator[list[int]]:
        """The rows of every step that is not done yet; found from their place in the epoch, nothing is replayed."""
        while self.done < self.total_steps:
            epoch, first = divmod(self.done, self.steps_per_epoch)
            steps = epoch_steps(self.lengths, seed=self.config.seed, epoch=epoch, batch_size=self.config.batch_size)
            for rows in steps[first : first + self.total_steps - self.done]:
                if self._is_stale():
                    return
                yield rows

    def _is_stale(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience

    def _advance(self, rows: list[int]) -> StepReport:
        """One optimizer step, and an evaluation where one is due."""
        step = self.done + 1
        started = time.perf_counter()
        self.train_loss, lr, grad_norm = self._step(step, rows)
        seconds = time.perf_counter() - started
        tokens = sum(self.lengths[row] for row in rows)
        self.trained_tokens += tokens
        self.done = step
        due = self._evaluate_if_due()
        return StepReport(
            step=step,
            total_steps=self.total_steps,
            epoch=step / self.steps_per_epoch,
            loss=self.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            tokens_per_batch=self.tokens_per_batch,
            eval_loss=self.eval_loss if due else None,
        )

    def _evaluate_if_due(self) -> bool:
        step, every = self.done, self.config.eval_steps or self.steps_per_epoch
        due = step % every == 0 or step % self.steps_per_epoch == 0 or step == self.total_steps
        if not due or not self.eval_examples:
            return False
        loss = evaluate(self.model, self.eval_examples, task=self.task, tokens_per_batch=self.tokens_per_batch)
        self.eval_loss = loss
        if self.best_eval_loss is None or loss < self.best_eval_loss:
            self.best_eval_loss, self.evaluations_since_best = loss, 0
        else:
            self.evaluations_since_best += 1
        return True

    def _step(self, step: int, rows: list[int]) -> tuple[float, float, float]:
        """One optimizer step over `rows`; returns (loss, lr, grad_norm)."""
        loss = distributed.total(self._gradients(step, rows), self.model.device)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss} at step {step}; lower the learning rate", step=step)
        if step == 1 and distributed.share(rows, self.lengths):
            _require_gradients(self.model)
        distributed.sum_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not math.isfinite(norm):
            raise TrainingDiverged(f"the gradient is {norm} at step {step}; lower the learning rate", step=step)
        lr = self.config.learning_rate * self._factor(step - 1)
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        if self.after_step:
            self.after_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, lr, norm

    def _gradients(self, step: int, rows: list[int]) -> float:
        """This process's share of the step's loss, its gradients added up; in smaller pieces if memory runs out."""
        if distributed.world_size() > 1:  # only one process's generator is in a checkpoint
            torch.manual_seed(hash((self.config.seed, step, distributed.rank())))
        # Averaged over the targets of the step, not over micro-batches or processes, whose sizes differ.
        targets = sum(self.task.targets(self.examples[row]) for row in rows)
        mine = distributed.share(rows, self.lengths)
        generators = rng_state(self.model.device)
        while True:
            packed = packs(self.task)
            cut = partial(micro_batches, lengths=self.lengths, max_tokens=self.tokens_per_batch, packed=packed)
            pieces = cut(mine)
            try:
                loss = sum(self._piece(piece, targets) for piece in pieces)
                for row in distributed.idle_rows(self.model, rows, self.lengths, cut):
                    self._piece([row], math.inf)  # it adds zero
                return loss
            except (RuntimeError, MemoryError) as error:
                # Where the base is sharded, the other processes are in the midst of the same layers.
                final = distributed.is_sharded(self.model) or all(len(piece) == 1 for piece in pieces)
                if not is_out_of_memory(error) or final:
                    raise
            # Here the error is gone, and with it the frames that held the activations.
            self.optimizer.zero_grad(set_to_none=True)
            self.forget()
            release()
            self.model.train()
            set_rng_state(generators, self.model.device)
            self.tokens_per_batch = self._largest(pieces) // 2

    def _piece(self, piece: list[int], targets: float) -> float:
        batch = self.task.collate([self.examples[row] for row in piece], self.model.device)
        share = distributed.loss_sum(self.task, self.model, batch) / targets
        share.backward()
        return share.item()

    def _largest(self, pieces: list[list[int]]) -> int:
        """Tokens of the largest piece that can still be cut."""
        lengths = [[self.lengths[row] for row in piece] for piece in pieces if len(piece) > 1]
        return max(sum(piece) if packs(self.task) else piece[0] * len(piece) for piece in lengths)

    def _factor(self, step: int) -> float:
        warmup = math.ceil(self.config.warmup_ratio * self.total_steps)
        return lr_factor(step, total=self.total_steps, warmup=warmup, schedule=self.config.lr_scheduler_type)


def _require_gradients(model: nn.Module) -> None:
    # A factor that the loss does not reach would be published at its start values.
    without = [name for name, parameter in trained_parameters(model).items() if parameter.grad is None]
    if without:
        raise NoGradient(f"no gradient reaches {', '.join(without[:5])}", modules=without)
