"""What the child process makes of a merge before it is published."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import NotFaithful
from lora_core.merge import merge
from lora_core.plan import plan_merge
from registry.jobs.spec import MergeOptions
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base
from worker import canary_child
from worker.canary_child import compare_merge
from worker.certificate import Canary, read_canary, read_certificate
from worker.merge_child import merge_adapter
from worker.protocol import StepMessage, parse
from worker.reporter import Reporter
from worker.task import OUT, CanaryTask, MergeTask


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("canary")
    base = make_base(root / "base", hidden=64, dtype="bfloat16")
    make_peft_adapter(base, root / "adapter", r=4)
    return {path.name: path for path in root.iterdir()}


def merge_to(workspace: Path, folders: dict[str, Path], options: MergeOptions) -> CanaryTask:
    task = MergeTask(base_dir=folders["base"], adapter_dir=folders["adapter"], options=options)
    merge_adapter(task, workspace, reporter())
    return CanaryTask(merge=task)


def reporter() -> Reporter:
    return Reporter(os.open(os.devnull, os.O_WRONLY))


def compared(task: CanaryTask, workspace: Path) -> Canary:
    reader, writer = os.pipe()
    compare_merge(task, workspace, Reporter(writer))
    told = [parse(line) for line in os.read(reader, 2**16).splitlines()]
    os.close(reader)
    canary = read_canary(workspace)
    steps = [message for message in told if isinstance(message, StepMessage)]
    assert [step.step for step in steps] == list(range(1, steps[0].total_steps + 1) if canary.run else [])
    return canary


def test_a_merge_into_four_bits_states_the_loss_of_both_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    task = merge_to(tmp_path, folders, MergeOptions(start="nf4"))
    canary = compared(task, tmp_path)
    assert canary.run
    losses = canary.losses
    assert losses.keys() == {"base", "adapter_on_original", "merged_original", "adapter_on_nf4", "merged_nf4"}
    assert losses["merged_nf4"] == pytest.approx(losses["adapter_on_nf4"], rel=1e-3)
    assert losses["merged_nf4"] != losses["merged_original"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary.json", "certificate.json", OUT]
    recipe = plan_merge(folders["base"], folders["adapter"], start="nf4").recipe
    expected = merge(folders["base"], folders["adapter"], tmp_path / "expected", recipe=recipe, digests=True)
    _, files = read_certificate(tmp_path)
    assert {file.path: file.sha256 for file in files} == {file.path: file.sha256 for file in expected.files}


def test_a_scaled_merge_is_compared_with_the_adapter_at_that_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    task = merge_to(tmp_path, folders, MergeOptions(scale=-1.5, dtype="float32"))
    canary = compared(task, tmp_path)
    assert canary.run
    assert (canary.kl or 1) < 1e-9


def test_a_damaged_merge_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    task = merge_to(tmp_path, folders, MergeOptions(dtype="float32"))
    weights = tmp_path / OUT / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(NotFaithful, match="does not say what base and adapter say"):
        compared(task, tmp_path)
    assert not (tmp_path / "canary.json").exists()


def test_without_memory_for_it_there_is_a_reason(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = merge_to(tmp_path, folders, MergeOptions())
    monkeypatch.setattr(canary_child, "available_bytes", lambda: 1000)
    canary = compared(task, tmp_path)
    assert (canary.run, canary.prompts) == (False, [])
    assert "0.0 GiB were free" in (canary.reason or "")


def test_a_base_that_only_numpy_can_merge_is_not_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders["base"], tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    (tmp_path / "work").mkdir()
    task = merge_to(tmp_path / "work", {**folders, "base": base}, MergeOptions())
    canary = compared(task, tmp_path / "work")
    assert (canary.run, canary.reason) == (False, "the base model lacks tokenizer.json")
