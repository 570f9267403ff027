"""A run that goes on from a checkpoint ends with the bits of the run that was never interrupted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_core.adapter import save_adapter
from lora_core.attention import DocumentsFunction
from lora_core.checkpoint import CHECKPOINT_FILES, DOCUMENT_FILE, TENSORS_FILE, Fingerprint, differences
from lora_core.classification import Classification
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.dpo import DPO
from lora_core.errors import BadCheckpoint, CheckpointMismatch
from lora_core.fingerprint import _CODE, take_fingerprint
from lora_core.inject import inject
from lora_core.model import load_base
from lora_core.seq2seq import Seq2Seq
from lora_core.state import TrainState, load_checkpoint, save_checkpoint
from lora_core.task import CausalLM
from lora_core.train import StepReport, TrainConfig, TrainResult, train
from tests.tiny import make_rows

LORA = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.3)
# 2 epochs and a bit of steps whose rows come in several micro-batches; the rate still rises at the first kills.
CONFIG = TrainConfig(
    n_epochs=3,
    batch_size=8,
    max_steps=7,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    warmup_ratio=0.5,
    weight_decay=0.1,
    seed=3,
    tokens_per_batch=128,
)


class Run:
    """A fresh process would do the same: load, inject, train."""

    def __init__(self, base: Path, lora: LoraConfig = LORA, n: int = 20) -> None:
        self.model, tokenizer = load_base(base)
        self.lora = lora
        self.examples = tokenize_rows(tokenizer, make_rows(n), 100).examples
        inject(self.model, lora, seed=CONFIG.seed)
        self.reports: list[StepReport] = []

    def train(self, config: TrainConfig = CONFIG, **over) -> TrainResult:
        return train(
            self.model, self.examples, config, eval_examples=self.examples[:4], on_step=self.reports.append, **over
        )

    def fingerprint(self, config: TrainConfig = CONFIG) -> Fingerprint:
        return take_fingerprint(self.model, self.examples, config, base_digest="0" * 64)

    def adapter(self, directory: Path) -> bytes:
        save_adapter(self.model, self.lora, directory)
        return (directory / "adapter_model.safetensors").read_bytes()


def content(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in CHECKPOINT_FILES]


def saver(run: Run, folder: Path) -> Callable[[TrainState], None]:
    return lambda state: save_checkpoint(folder / str(state.step), state, run.fingerprint())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path):
    """The uninterrupted run, its result and a checkpoint of every step."""
    torch.set_num_threads(1)  # as every test here has it
    folder = tmp_path_factory.mktemp("straight")
    run = Run(llama)
    result = run.train(on_checkpoint=saver(run, folder))
    return run, result, folder


def seconds_aside(report: StepReport) -> StepReport:
    return replace(report, tokens_per_second=0.0)


@pytest.mark.parametrize("step", range(1, 8))
def test_a_kill_after_any_step_changes_no_bit(straight, llama: Path, tmp_path: Path, step: int) -> None:
    first, first_result, folder = straight
    assert len(first.reports) == 7
    torch.manual_seed(step)  # what the process did before must not matter
    run = Run(llama)
    state, saved = load_checkpoint(folder / str(step))
    assert differences(saved, run.fingerprint()) == []
    result = run.train(resume_from=state, on_checkpoint=saver(run, tmp_path))
    assert result == first_result
    assert [seconds_aside(r) for r in run.reports] == [seconds_aside(r) for r in first.reports[step:]]
    assert run.adapter(tmp_path / "a") == first.adapter(tmp_path / "b")
    for later in range(step + 1, 8):
        assert content(tmp_path / str(later)) == content(folder / str(later))


def test_the_run_really_has_what_is_hard_to_resume(straight) -> None:
    run, _, folder = straight
    assert run.reports[1].lr > run.reports[0].lr  # warm-up
    assert [report.eval_loss is not None for report in run.reports] == [False, False, True, False, False, True, True]
    rng = [load_checkpoint(folder / step)[0].tensors["rng.cpu"] for step in ("1", "2")]
    assert not torch.equal(*rng)  # dropout


def test_a_kill_inside_a_step_repeats_the_whole_step(straight, llama: Path, tmp_path: Path) -> None:
    first, _, folder = straight
    run = Run(llama)
    steps: list[Path] = []
    backwards = 0

    def power_cut(_grad: torch.Tensor) -> None:
        nonlocal backwards
        backwards += len(run.reports) == 3
        if backwards == 2:
            raise KeyboardInterrupt

    factor = next(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    factor.register_post_accumulate_grad_hook(power_cut)
    with pytest.raises(KeyboardInterrupt):
        run.train(on_checkpoint=lambda state: steps.append(Path(str(state.step))))
    again = Run(llama)
    again.train(resume_from=load_checkpoint(folder / str(steps[-1]))[0])
    assert str(steps[-1]) == "3"
    assert again.adapter(tmp_path / "a") == first.adapter(tmp_path / "b")


@pytest.mark.parametrize("forgotten", ["exp_avg", "exp_avg_sq", "updates", "rng"])
def test_every_part_of_the_state_counts(straight, llama: Path, tmp_path: Path, forgotten: str) -> None:
    first, _, folder = straight
    state = load_checkpoint(folder / "3")[0]
    blank = {
        name: torch.zeros_like(tensor) if name.startswith(f"{forgotten}.") else tensor
        for name, tensor in state.tensors.items()
    }
    if forgotten == "rng":
        blank["rng.cpu"] = load_checkpoint(folder / "2")[0].tensors["rng.cpu"]
    run = Run(llama)
    run.train(resume_from=replace(state, tensors=blank))
    assert run.adapter(tmp_path / "a") != first.adapter(tmp_path / "b")


def test_should_checkpoint_chooses_the_steps(llama: Path) -> None:
    run, steps = Run(llama), []
    run.train(on_checkpoint=lambda state: steps.append(state.step), should_checkpoint=lambda r: r.step % 3 == 0)
    assert steps == [3, 6]


def test_a_state_does_not_change_with_the_run(straight, llama: Path) -> None:
    _, _, folder = straight
    run, states = Run(llama), []
    run.train(on_checkpoint=states.append)
    at_once = load_checkpoint(folder / "2")[0].tensors
    assert [name for name, tensor in at_once.items() if not torch.equal(states[1].tensors[name], tensor)] == []


def test_others_can_read_the_tensors(straight) -> None:
    _, _, folder = straight
    with safe_open(folder / "2" / TENSORS_FILE, "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("updates.model.layers.0.mlp.up_proj.lora_A").tolist() == [2.0]
    assert {name.split(".")[0] for name in names} == {"lora", "exp_avg", "exp_avg_sq", "updates", "rng"}


def test_a_checkpoint_appears_whole_or_not_at_all(straight, tmp_path: Path, monkeypatch) -> None:
    _, _, folder = straight
    state, saved = load_checkpoint(folder / "1")
    monkeypatch.setattr("lora_core.state.encode_document", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path / "new", state, saved)
    assert list(tmp_path.iterdir()) == []


def damage(directory: Path, how: str) -> None:
    tensors, document = directory / TENSORS_FILE, directory / DOCUMENT_FILE
    data, body = tensors.read_bytes(), json.loads(document.read_bytes())
    match how:
        case "bit flip":
            tensors.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "truncated":
            tensors.write_bytes(data[:-4])
        case "longer":
            tensors.write_bytes(data + b"\0")
        case "no tensors":
            tensors.unlink()
        case "no document":
            document.unlink()
        case "half a document":
            document.write_bytes(document.read_bytes()[:50])
        case "huge document":
            document.write_bytes(b" " * 2**20)
        case "a list":
            document.write_text("[]")
        case "format":
            document.write_text(json.dumps(body | {"format": 1}))
        case "surplus":
            document.write_text(json.dumps(body | {"code": "import os"}))
        case "step":
            document.write_text(json.dumps(body | {"step": True}))
        case "loss":
            document.write_text(json.dumps(body | {"train_loss": "low"}))
        case "digest":
            document.write_text(json.dumps(body | {"tensors_sha256": 7}))
        case "fingerprint":
            document.write_text(json.dumps(body | {"fingerprint": {"inputs": {"a": 1}, "environment": {}}}))
        case "half a fingerprint":
            document.write_text(json.dumps(body | {"fingerprint": {"inputs": {}}}))


@pytest.mark.parametrize(
    "how",
    [
        *("bit flip", "truncated", "longer", "no tensors", "no document", "half a document", "huge document"),
        *("a list", "format", "surplus", "step", "loss", "digest", "fingerprint", "half a fingerprint"),
    ],
)
def test_damage_is_noticed(straight, tmp_path: Path, how: str) -> None:
    _, _, folder = straight
    for name in CHECKPOINT_FILES:
        (tmp_path / name).write_bytes((folder / "2" / name).read_bytes())
    load_checkpoint(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(BadCheckpoint):
        load_checkpoint(tmp_path)


def test_another_run_is_refused_by_name(straight, llama: Path) -> None:
    run, _, _ = straight
    saved = run.fingerprint()
    others = {
        "training": run.fingerprint(replace(CONFIG, learning_rate=1e-3)),
        "lora": Run(llama, replace(LORA, lora_dropout=0.2)).fingerprint(),
        "examples": Run(llama, n=21).fingerprint(),
        "base_model": take_fingerprint(run.model, run.examples, CONFIG, base_digest="1" * 64),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointMismatch, match=f"differs in {name}$"):
            differences(saved, other)


def test_a_changed_environment_is_told_in_words(straight) -> None:
    run, _, _ = straight
    now = run.fingerprint()
    before = Fingerprint(now.inputs, {**now.environment, "torch": "2.0.0", "threads": "64"})
    torch_now = now.environment["torch"]
    assert differences(before, now) == ["threads 64 → 1", f"torch 2.0.0 → {torch_now}"]


@pytest.mark.parametrize("part", [CausalLM, Classification, DPO, Seq2Seq, DocumentsFunction])
def test_a_resume_on_other_code_that_computes_is_not_called_exact(part: type) -> None:
    assert part.__module__.rpartition(".")[2] in _CODE


def test_a_device_that_does_not_repeat_is_never_exact(straight) -> None:
    run, _, _ = straight
    now = run.fingerprint()
    gpu = Fingerprint(now.inputs, {**now.environment, "repeatable": "no"})
    assert len(differences(gpu, gpu)) == 1


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_state_of_other_layers_is_refused(straight, llama: Path, change: str) -> None:
    _, _, folder = straight
    state = load_checkpoint(folder / "2")[0]
    tensors = dict(state.tensors)
    name = "exp_avg.model.layers.0.mlp.up_proj.lora_A"
    match change:
        case "missing":
            del tensors[name]
        case "surplus":
            tensors[f"{name}.more"] = tensors[name]
        case "shape":
            tensors[name] = tensors[name].T
    with pytest.raises(CheckpointMismatch, match=name):
        Run(llama).train(resume_from=replace(state, tensors=tensors))


def test_a_state_beyond_the_end_is_refused(straight, llama: Path) -> None:
    _, _, folder = straight
    state = load_checkpoint(folder / "7")[0]
    with pytest.raises(CheckpointMismatch, match="step 7"):
        Run(llama).train(replace(CONFIG, max_steps=6), resume_from=state)
