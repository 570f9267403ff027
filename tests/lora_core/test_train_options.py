"""What the loop does besides plain steps: LoRA+, evaluation, early stopping, checkpointing, memory that runs out."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.errors import BadConfig
from lora_core.inject import inject
from lora_core.model import load_base
from lora_core.pressure import is_out_of_memory
from lora_core.state import TrainState, load_checkpoint, save_checkpoint
from lora_core.task import CausalLM
from lora_core.train import StepReport, TrainConfig, TrainResult, train
from lora_core.trainable import trained_parameters
from tests.lora_core.test_resume import Run as ResumedRun
from tests.tiny import make_rows

CONFIG = TrainConfig(n_epochs=2, batch_size=8, learning_rate=1e-2, tokens_per_batch=256)


class Run:
    def __init__(self, base: Path, n: int = 20, **lora: Any) -> None:
        self.model, tokenizer = load_base(base)
        self.examples = tokenize_rows(tokenizer, make_rows(n), 100).examples
        inject(self.model, LoraConfig(r=4, lora_alpha=16, **lora), seed=0)
        self.reports: list[StepReport] = []

    def train(self, config: TrainConfig = CONFIG, **over: Any) -> TrainResult:
        return train(self.model, self.examples, config, on_step=self.reports.append, **over)

    def factors(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in trained_parameters(self.model).items()}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_lora_plus_multiplies_the_rate_of_every_lora_b_only(llama: Path) -> None:
    moves = []
    for ratio in (None, 8.0):
        run = Run(llama)
        start = run.factors()
        run.train(replace(CONFIG, max_steps=1, loraplus_lr_ratio=ratio))
        # AdamW's first step is the rate times the sign of the gradient.
        moves.append({name: (value - start[name]).abs().max().item() for name, value in run.factors().items()})
    for name, move in moves[0].items():
        assert moves[1][name] == pytest.approx((8 if name.endswith("lora_B") else 1) * move, rel=1e-3)


def test_evaluations_come_every_so_many_steps_and_at_the_ends(llama: Path) -> None:
    run = Run(llama)
    run.train(replace(CONFIG, eval_steps=2), eval_examples=run.examples[:4])
    assert [report.eval_loss is not None for report in run.reports] == [False, True, True, True, False, True]


def test_a_run_that_no_longer_learns_ends_early(llama: Path) -> None:
    run = Run(llama)
    config = replace(CONFIG, n_epochs=9, learning_rate=1e-9, eval_steps=1, early_stopping_patience=2)
    result = run.train(config, eval_examples=worsening(run))
    assert (result.stopped, result.early_stopped) == (False, True)
    losses = [report.eval_loss for report in run.reports]
    best = losses.index(min(losses))
    assert result.steps == len(losses) == best + 3
    assert result.steps < result.total_steps


def worsening(run: Run) -> list[Any]:
    """Examples whose labels are what the others make less likely."""
    return [replace(example, labels=example.labels[::-1].copy()) for example in run.examples[:4]]


def test_a_run_that_learns_does_not(llama: Path) -> None:
    run = Run(llama)
    result = run.train(replace(CONFIG, early_stopping_patience=1), eval_examples=run.examples)
    assert (result.steps, result.early_stopped) == (6, False)


def test_patience_without_rows_to_evaluate_on_is_refused(llama: Path) -> None:
    with pytest.raises(BadConfig, match="early_stopping_patience"):
        Run(llama).train(replace(CONFIG, early_stopping_patience=1))


@pytest.mark.parametrize("packing", [True, False])
def test_activation_checkpointing_keeps_less_and_changes_no_bit(llama: Path, packing: bool) -> None:
    results, kept = [], []
    for checkpointing in (False, True):
        run = Run(llama, lora_dropout=0.3)
        saved: list[int] = []
        config = replace(CONFIG, max_steps=2, packing=packing, activation_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            run.train(config)
        results.append(run.factors())
        kept.append(sum(saved))
        assert not run.model.is_activation_checkpointing
    assert is_equal(*results)
    assert kept[1] < kept[0] / 2


class Full(CausalLM):
    """Memory for so many tokens, and a way to run out of it."""

    def __init__(self, tokens: int, fail: Callable[[], Any], *, packing: bool) -> None:
        super().__init__(packing=packing)
        self.tokens, self.fail = tokens, fail
        self.sizes: list[int] = []

    def loss_sum(self, model: Any, batch: Any) -> torch.Tensor:
        size = (batch.input_ids if self.packing else batch[0]).numel()
        if size > self.tokens:
            self.fail()
        self.sizes.append(size)
        return super().loss_sum(model, batch)


def refuse_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)  # the allocator says no by itself


def refuse_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def refuse_python() -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [refuse_cpu, refuse_cuda, refuse_python])
def test_every_kind_of_refused_allocation_is_known(fail: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("packing", [True, False])
def test_memory_that_runs_out_halves_the_micro_batch_and_not_the_step(llama: Path, packing: bool) -> None:
    """The redone step, its dropout too, is that of a run that had known the limit from the start."""
    config = replace(CONFIG, max_steps=3, tokens_per_batch=4096, packing=packing)
    short = Run(llama, lora_dropout=0.3)
    task = Full(200, refuse_cpu, packing=packing)
    short.train(config, task=task)
    limit = short.reports[0].tokens_per_batch
    assert limit < 4096
    assert max(task.sizes) <= 200
    known = Run(llama, lora_dropout=0.3)
    known.train(replace(config, tokens_per_batch=limit))
    assert [report.tokens_per_batch for report in known.reports] == [limit] * 3
    assert is_equal(short.factors(), known.factors())


def test_memory_that_runs_out_between_micro_batches_counts_none_twice(llama: Path) -> None:
    run, calls = Run(llama), 0

    def sometimes() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the second of several pieces
            refuse_cuda()

    config = replace(CONFIG, max_steps=1, tokens_per_batch=150)
    run.train(config, task=Full(0, sometimes, packing=True))
    whole = Run(llama)
    whole.train(replace(config, tokens_per_batch=4096))
    assert run.reports[0].grad_norm == pytest.approx(whole.reports[0].grad_norm, rel=1e-4)


def test_memory_that_runs_out_between_layers_that_share_their_input_leaves_nothing_behind(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs of keys and values are there when the queries' reader fails: the next try needs their memory."""
    run, held, left = Run(llama), [], []

    def fail_once(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not held:
            held.extend([weakref.ref(inputs[0]), weakref.ref(output)])
            refuse_cuda()

    def look() -> None:
        gc.collect()
        left.extend(reference() for reference in held)

    run.model.model.layers[0].self_attn.q_proj.register_forward_hook(fail_once)
    monkeypatch.setattr("lora_core.train.release", look)
    run.train(replace(CONFIG, max_steps=1, tokens_per_batch=4096))
    assert left == [None, None]


def test_a_row_that_alone_is_too_large_is_the_error_it_is(llama: Path) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        Run(llama).train(task=Full(5, refuse_cpu, packing=True))


def test_other_errors_are_not_taken_for_memory(llama: Path) -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Run(llama).train(task=Full(5, broken, packing=True))


EVERYTHING = replace(
    CONFIG,
    n_epochs=4,
    lr_scheduler_type="cosine",
    warmup_ratio=0.3,
    loraplus_lr_ratio=4.0,
    eval_steps=2,
    early_stopping_patience=2,
    activation_checkpointing=True,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path):
    """A run with everything on, that runs out of memory and ends early, with a checkpoint of every step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight")
    run = Run(llama, lora_dropout=0.3)
    fingerprint = ResumedRun(llama).fingerprint()

    def save(state: TrainState) -> None:
        save_checkpoint(folder / str(state.step), state, fingerprint)

    result = everything(run, on_checkpoint=save)
    return run, result, folder


def everything(run: Run, **over: Any) -> TrainResult:
    return run.train(EVERYTHING, task=Full(200, refuse_cpu, packing=True), eval_examples=worsening(run), **over)


def test_the_run_with_everything_on_has_what_is_hard_to_resume(straight) -> None:
    run, result, _ = straight
    assert result.early_stopped
    assert 4 <= result.steps < result.total_steps
    assert run.reports[0].tokens_per_batch < EVERYTHING.tokens_per_batch


def test_a_kill_after_any_step_changes_no_bit_with_everything_on(straight, llama: Path) -> None:
    first, first_result, folder = straight
    for step in range(1, first_result.steps + 1):
        torch.manual_seed(step)
        run = Run(llama, lora_dropout=0.3)
        assert everything(run, resume_from=load_checkpoint(folder / str(step))[0]) == first_result
        assert is_equal(run.factors(), first.factors())
        assert [replace(r, tokens_per_second=0.0) for r in run.reports] == [
            replace(r, tokens_per_second=0.0) for r in first.reports[step:]
        ]
