"""What a plan says a step takes, against what the allocator reports while the step is taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_core.config import LoraConfig
from lora_core.inject import inject
from lora_core.memory import plan_memory
from lora_core.model import load_base
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from tests.lora_core.one_step import LABELLED, example
from tests.tiny import make_base

LENGTHS = (250, 200, 150)
LORA = LoraConfig(r=8, lora_alpha=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("memory") / "base", "llama", hidden=64, layers=3, vocab=2000)


def measured(base: Path, config: TrainConfig) -> int:
    """The most that a run's first step had allocated at once."""
    model, _ = load_base(base, "float32", device="cpu")
    inject(model, LORA, seed=0)
    examples = [example(length) for length in LENGTHS]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(model, examples, config)
    now = peak = 0
    events: Any = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": False}, {"activation_checkpointing": True}],
    ids=["packed", "padded", "checkpointed"],
)
def test_a_step_takes_what_was_planned_within_15_per_cent(base: Path, options: dict[str, Any]) -> None:
    config = TrainConfig(batch_size=len(LENGTHS), max_steps=2, **options)
    plan = plan_memory(base, LORA, config, LENGTHS, labelled=LABELLED, dtype=torch.float32)
    assert plan.step == pytest.approx(measured(base, config), rel=0.15)


def test_where_malloc_gives_memory_back_the_whole_process_is_as_large_as_planned(tmp_path: Path) -> None:
    base, warm = tmp_path / "base", tmp_path / "warm"
    make_base(base, hidden=256, layers=4, vocab=8000)
    make_base(warm)
    command = [sys.executable, "-m", "tests.lora_core.one_step", str(base), str(warm), json.dumps([512] * 4)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["step"] > 0.2 * found["total"]  # not just the interpreter and its libraries
    assert found["total"] == pytest.approx(found["held"], rel=0.15)


def test_checkpointing_and_packing_are_planned_as_savings(base: Path) -> None:
    def activations(**options: Any) -> int:
        config = TrainConfig(batch_size=3, **options)
        return plan_memory(base, LORA, config, LENGTHS, labelled=LABELLED, dtype=torch.float32).activations

    assert activations(activation_checkpointing=True) < activations() < activations(packing=False)


def test_weights_and_factors_are_counted_exactly(base: Path) -> None:
    plan = plan_memory(base, LORA, TrainConfig(), LENGTHS, labelled=LABELLED, dtype=torch.bfloat16)
    model, _ = load_base(base, "bfloat16", device="cpu")
    assert plan.base == sum(value.numel() * 2 for value in model.parameters())
    inject(model, LORA, seed=0)
    factors = sum(value.numel() * 4 for value in trained_parameters(model).values())
    assert (plan.adapter, plan.gradients, plan.optimizer) == (factors, factors, 2 * factors)
    assert plan.total == plan.base + plan.adapter + plan.step + plan.runtime


def test_planning_allocates_no_model(base: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        plan = plan_memory(base, LORA, TrainConfig(), LENGTHS, labelled=LABELLED, dtype=torch.float32)
    events: Any = profiled.profiler.kineto_results.events()
    assert sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]") < plan.activations / 10
