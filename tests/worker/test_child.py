"""The child's own code, called in this process: what it makes, and what it says when it cannot."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import BadBase, DatasetError, LoraError, NonFinite, TrainingDiverged
from lora_core.gate import check_adapter
from lora_core.train import TrainResult, train
from registry.jobs.spec import TrainSpec
from tests.tiny import make_rows, write_jsonl
from tests.worker.depot import LORA
from worker import train_child
from worker.child import EXIT_STOPPED, explain
from worker.child_env import child_env
from worker.protocol import AliveMessage, PhaseMessage, ResultMessage, ResumedMessage, StepMessage, capped_lines, parse
from worker.reporter import Reporter, Stopped
from worker.task import TrainTask, write_task
from worker.train_child import train_adapter


@pytest.fixture
def task(base_dir: Path, tmp_path: Path) -> TrainTask:
    spec = {"lora": LORA, "n_epochs": 2, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
    return TrainTask(
        base_dir=base_dir,
        base_digest="0" * 64,
        base_model="org/base",
        revision="a" * 40,
        training_file=write_jsonl(tmp_path / "train.jsonl", make_rows(8)),
        validation_file=write_jsonl(tmp_path / "valid.jsonl", make_rows(3, "prompt")),
        spec=TrainSpec.model_validate(spec),
        resume_from=None,
        checkpoint_seconds=3600.0,
        threads=1,
    )


@pytest.fixture
def said(tmp_path: Path) -> Path:
    return tmp_path / "said"


@pytest.fixture
def reporter(said: Path) -> Reporter:
    return Reporter(os.open(said, os.O_WRONLY | os.O_CREAT))


def test_the_adapter_names_its_base_and_the_steps_are_told(
    task: TrainTask, tmp_path: Path, reporter: Reporter, said: Path
) -> None:
    result = train_adapter(task, tmp_path, reporter)
    assert isinstance(result, ResultMessage)
    assert result.metrics["steps"] == 4
    assert result.metrics["valid_loss"] > 0
    config = check_adapter(tmp_path / "out").config
    assert (config.base_model_name_or_path, config.revision, config.r) == ("org/base", "a" * 40, 4)
    with said.open("rb") as lines:
        messages = [parse(line) for line in capped_lines(lines)]
    assert None not in messages
    phases = [message.phase for message in messages if isinstance(message, PhaseMessage)]
    assert phases == ["loading", "tokenizing", "training", "saving"]
    assert any(isinstance(message, AliveMessage) for message in messages)  # of layers, while they are made
    steps = [message for message in messages if isinstance(message, StepMessage)]
    assert [(step.step, step.valid_loss is not None) for step in steps] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]
    assert steps[-1].eta_seconds == 0


def test_a_request_to_stop_ends_training_at_a_step(task: TrainTask, tmp_path: Path, reporter: Reporter) -> None:
    reporter.stop()
    with pytest.raises(Stopped):
        train_adapter(task, tmp_path, reporter)
    assert not (tmp_path / "out").exists()


def test_rows_that_teach_nothing_are_the_users_to_fix(task: TrainTask, tmp_path: Path, reporter: Reporter) -> None:
    write_jsonl(task.training_file, [{"prompt": "word " * 200, "completion": "yes"}])
    with pytest.raises(DatasetError) as caught:
        train_adapter(task, tmp_path, reporter)
    told = explain(caught.value)
    assert (told.error_class, told.code) == ("user", "no_trainable_tokens")
    assert "training file" in told.message
    assert "within 64 tokens" in told.message


def test_training_that_changes_nothing_is_no_adapter(task: TrainTask, tmp_path: Path, reporter: Reporter) -> None:
    frozen = task.spec.model_copy(update={"learning_rate": 1e-45})
    with pytest.raises(LoraError, match="changed nothing") as caught:
        train_adapter(task.model_copy(update={"spec": frozen}), tmp_path, reporter)
    assert explain(caught.value).error_class == "user"


def test_a_model_without_repeatable_kernels_is_trained_all_the_same(
    task: TrainTask, tmp_path: Path, reporter: Reporter, said: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [RuntimeError("cumsum does not have a deterministic implementation")]

    def refuse_once(*args: Any, **options: Any) -> TrainResult:
        if refusals:
            raise refusals.pop()
        return train(*args, **options)

    monkeypatch.setattr(train_child, "train", refuse_once)
    train_adapter(task, tmp_path, reporter)
    assert check_adapter(tmp_path / "out").config.r == 4
    assert b"Not repeatable bit for bit on this device: cumsum" in said.read_bytes()


def test_after_the_machine_ran_out_of_memory_less_is_in_it_at_once(
    task: TrainTask, tmp_path: Path, reporter: Reporter, said: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force = []

    def watch(*args: Any, **options: Any) -> TrainResult:
        in_force.append((args[2].tokens_per_batch, (state := options["resume_from"]) and state.tokens_per_batch))
        return train(*args, **options)

    monkeypatch.setattr(train_child, "train", watch)
    saving = task.model_copy(update={"checkpoint_seconds": 1e-9})
    train_adapter(saving, tmp_path / "first", reporter)
    resumed = {"halvings": 3, "resume_from": tmp_path / "first" / "checkpoints" / "2"}
    train_adapter(task.model_copy(update=resumed), tmp_path / "second", reporter)
    assert check_adapter(resumed["resume_from"]).config.r == 4  # what was learned so far lies beside it
    full = in_force[0][0]
    assert in_force == [(full, None), (full // 8, full // 8)]
    with said.open("rb") as lines:
        (told,) = [found for line in capped_lines(lines) if isinstance(found := parse(line), ResumedMessage)]
    assert told.differences == [f"{full // 8} tokens in memory at once, fewer than before"]


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        (TrainingDiverged("the loss is nan at step 3"), "diverged"),
        (NonFinite("float16 is too small"), "user"),
        (BadBase("the header ends early"), "infra"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "oom"),
        (OSError(28, "No space left on device"), "infra"),
        (KeyError("oops"), "bug"),
    ],
)
def test_each_error_has_its_class(error: Exception, error_class: str) -> None:
    assert explain(error).error_class == error_class


def test_a_child_whose_supervisor_is_gone_ends(task: TrainTask, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")  # reading it blocks until somebody writes, which nobody does
    write_task(tmp_path, task.model_copy(update={"training_file": tmp_path / "never"}))
    argv = [sys.executable, "-P", "-m", "worker.child"]
    env = child_env(tmp_path, threads=1)
    child = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdin
    child.stdin.write(f"{tmp_path}\n".encode())
    child.stdin.flush()
    assert child.stdout
    assert isinstance(parse(child.stdout.readline()), PhaseMessage)
    child.stdin.close()
    assert child.wait(120) == EXIT_STOPPED
    child.stdout.close()


def test_a_child_sees_no_secrets(tmp_path: Path) -> None:
    ours = {"PATH": "/bin", "DEPOT_SECRET_KEY": "s", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "s", "HTTPS_PROXY": "s"}
    env = child_env(tmp_path, threads=3, environ=ours)
    assert "s" not in env.values()
    assert (env["PATH"], env["OMP_NUM_THREADS"], env["HF_HUB_OFFLINE"]) == ("/bin", "3", "1")


def test_preferences_are_trained_and_resumable(task: TrainTask, tmp_path: Path, reporter: Reporter, said: Path) -> None:
    rows = [{"prompt": f"{i} plus", "chosen": f" {i} equals", "rejected": " fox"} for i in range(8)]
    spec = task.spec.model_copy(update={"method": "dpo", "beta": 0.5})
    changes = {
        "spec": spec,
        "training_file": write_jsonl(tmp_path / "preferences.jsonl", rows),
        "validation_file": None,
        "checkpoint_seconds": 0.0,
    }
    task = task.model_copy(update=changes)
    result = train_adapter(task, tmp_path, reporter)
    assert result.metrics["train_loss"] < 0.69  # below that of not preferring either, log 2
    assert check_adapter(tmp_path / "out").config.r == 4
    assert b"checkpoint" in said.read_bytes()
