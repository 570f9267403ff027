"""Checkpoints in the child: when it saves, what it goes on from, and what it says about that."""

import json
import os
from pathlib import Path

import pytest

from lora_core.checkpoint import DOCUMENT_FILE, TENSORS_FILE
from registry.jobs.spec import TrainSpec
from tests.tiny import make_rows, write_jsonl
from tests.worker.depot import LORA
from worker.merge_recipe import read_recipe
from worker.protocol import (
    AnyMessage,
    CheckpointMessage,
    NoteMessage,
    PhaseMessage,
    ResumedMessage,
    StepMessage,
    capped_lines,
    parse,
)
from worker.reporter import Reporter, Stopped
from worker.task import CHECKPOINTS, OUT, TrainTask
from worker.train_child import train_adapter

EVERY_STEP = 1e-9


class Child:
    """One run of the training task in a folder of its own, and what it said."""

    def __init__(self, task: TrainTask, home: Path) -> None:
        home.mkdir()
        self.task, self.home = task, home
        self.reporter = Reporter(os.open(home / "said", os.O_WRONLY | os.O_CREAT))

    def run(self) -> "Child":
        train_adapter(self.task, self.home, self.reporter)
        return self

    def said(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        with (self.home / "said").open("rb") as lines:
            messages = [parse(line) for line in capped_lines(lines)]
        assert None not in messages
        return [message for message in messages if isinstance(message, kind)]

    def steps(self) -> list[int]:
        return [message.step for message in self.said(StepMessage)]

    def saved(self) -> list[int]:
        told = [message.step for message in self.said(CheckpointMessage)]
        folder = self.home / CHECKPOINTS
        assert sorted(told) == sorted(int(path.name) for path in folder.iterdir())
        return told

    def checkpoint(self, step: int) -> Path:
        return self.home / CHECKPOINTS / str(step)

    def adapter(self) -> bytes:
        return (self.home / OUT / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def task(base_dir: Path, tmp_path: Path) -> TrainTask:
    spec = {"lora": {**LORA, "lora_dropout": 0.2}, "n_epochs": 2, "batch_size": 4, "max_length": 64}
    return TrainTask(
        base_dir=base_dir,
        base_digest="0" * 64,
        base_model="org/base",
        revision=None,
        training_file=write_jsonl(tmp_path / "train.jsonl", make_rows(8)),
        validation_file=None,
        spec=TrainSpec.model_validate({**spec, "learning_rate": 1e-2}),
        resume_from=None,
        checkpoint_seconds=EVERY_STEP,
        threads=1,
    )


@pytest.fixture
def first(task: TrainTask, tmp_path: Path) -> Child:
    return Child(task, tmp_path / "first").run()


def resume(child: Child, step: int, home: Path) -> Child:
    return Child(child.task.model_copy(update={"resume_from": child.checkpoint(step)}), home).run()


def test_a_child_goes_on_where_another_one_was(first: Child, tmp_path: Path) -> None:
    assert (first.steps(), first.saved()) == ([1, 2, 3, 4], [1, 2, 3, 4])
    second = resume(first, 2, tmp_path / "second")
    assert second.said(ResumedMessage) == [ResumedMessage(step=2, differences=[])]
    assert second.steps() == [3, 4]
    assert second.adapter() == first.adapter()


def test_an_adapter_beside_a_checkpoint_has_its_merge_recipe(first: Child) -> None:
    recipe = read_recipe(first.home / OUT)
    assert recipe is not None
    assert {read_recipe(first.checkpoint(step)) for step in first.saved()} == {recipe}


def test_a_run_that_was_complete_is_only_saved_again(first: Child, tmp_path: Path) -> None:
    second = resume(first, 4, tmp_path / "second")
    assert (second.steps(), second.saved()) == ([], [])
    assert second.adapter() == first.adapter()


def test_another_environment_is_told_and_gone_on_in(first: Child, tmp_path: Path) -> None:
    path = first.checkpoint(2) / DOCUMENT_FILE
    document = json.loads(path.read_bytes())
    document["fingerprint"]["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(document))
    second = resume(first, 2, tmp_path / "second")
    (told,) = second.said(ResumedMessage)
    assert told.differences[0].startswith("torch 1.0 → ")
    assert second.steps() == [3, 4]


def test_other_rows_are_another_run(first: Child, tmp_path: Path) -> None:
    write_jsonl(first.task.training_file, make_rows(8, "prompt"))
    second = resume(first, 2, tmp_path / "second")
    assert [note.message for note in second.said(NoteMessage) if note.level == "warn"] == [
        "Training starts from the beginning: the checkpoint is of another run: it differs in examples."
    ]
    assert (second.said(ResumedMessage), second.steps()) == ([], [1, 2, 3, 4])


def test_damage_is_not_gone_on_from(first: Child, tmp_path: Path) -> None:
    (first.checkpoint(2) / TENSORS_FILE).write_bytes(b"nothing")
    second = resume(first, 2, tmp_path / "second")
    assert len([note for note in second.said(NoteMessage) if note.level == "warn"]) == 1
    assert second.steps() == [1, 2, 3, 4]
    assert second.adapter() == first.adapter()


def test_a_short_run_saves_nothing(task: TrainTask, tmp_path: Path) -> None:
    child = Child(task.model_copy(update={"checkpoint_seconds": 3600.0}), tmp_path / "child").run()
    assert child.saved() == []


def test_a_long_run_is_saved_at_its_end_too(first: Child, tmp_path: Path) -> None:
    patient = first.task.model_copy(update={"checkpoint_seconds": 3600.0, "resume_from": first.checkpoint(1)})
    child = Child(patient, tmp_path / "child").run()
    assert (child.steps(), child.saved()) == ([2, 3, 4], [4])


@pytest.mark.parametrize(("drain", "saved"), [(True, [2]), (False, [])])
def test_only_a_drain_saves_before_it_stops(
    task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: bool, saved: list[int]
) -> None:
    child = Child(task.model_copy(update={"checkpoint_seconds": 3600.0}), tmp_path / "child")
    tell = child.reporter.step

    def ask(step: StepMessage) -> None:
        tell(step)
        if step.step == 2:
            child.reporter.stop(drain=drain)

    monkeypatch.setattr(child.reporter, "step", ask)
    with pytest.raises(Stopped):
        child.run()
    assert (child.steps(), child.saved()) == ([1, 2], saved)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    task: TrainTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.saver.save_checkpoint", full)
    child = Child(task, tmp_path / "child").run()
    assert (child.steps(), child.saved()) == ([1, 2, 3, 4], [])
    assert "No checkpoint was saved at step 1: No space left on device." in [
        note.message for note in child.said(NoteMessage)
    ]
    assert [phase.phase for phase in child.said(PhaseMessage)][-1] == "saving"
