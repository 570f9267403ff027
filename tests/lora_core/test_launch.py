"""`lora_core.launch` on two machines, as far as one can be two: two torchrun agents that meet on the loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM

import lora_core.launch
from lora_core import distributed
from lora_core.adapter import load_adapter
from lora_core.checkpoint import TENSORS_FILE
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.errors import BadConfig, CheckpointMismatch, LoraError
from lora_core.inject import inject
from lora_core.launch import main, run
from lora_core.model import load_base
from lora_core.sharding import base_bytes, shard_base
from lora_core.train import TrainConfig, train
from tests.ports import free_port
from tests.tiny import make_rows, write_jsonl

ROOT = Path(__file__).parents[2]
STEPS = 6
# 17 rows: the last step of an epoch has one, and a process none. Their pieces differ in number.
SETTINGS = ("n_epochs=2", "batch_size=8", "learning_rate=0.01", "tokens_per_batch=96", "warmup_ratio=0.3")
LORA = ("r=4", "lora_alpha=16", "lora_dropout=0.0")


def arguments(base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    found = ["--base", str(base), "--rows", str(rows), "--eval-rows", str(rows), "--out", str(out)]
    found += ["--max-length", "100", "--save-steps", "1"]
    found += [part for setting in SETTINGS for part in ("--train", setting)]
    return [*found, *(part for setting in LORA for part in ("--lora", setting)), *more]


def tell(path: Path, told: Any) -> None:
    path.write_text(json.dumps(told))


def work(base: Path, rows: Path, out: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = distributed.rank()
    run(arguments(base, rows, out / "whole"))
    keep_every_checkpoint(out / "saved")
    full = run(arguments(base, rows, out / "full", "--sharding", "full", "--checkpoints", str(out / "of_full")))
    tell(out / f"full.{rank}", [full.steps, full.train_loss, full.eval_loss])
    run(arguments(base, rows, out / "resumed", "--sharding", "full", "--checkpoints", str(out / "saved" / "3")))
    tell(out / f"bytes.{rank}", count_bytes(base))
    others = out / "other_rows"
    if rank == 1:
        write_jsonl(others, make_rows(18))
    try:
        run(arguments(base, others if rank else rows, out / "never", "--sharding", "full"))
    except BadConfig as error:
        tell(out / f"refused.{rank}", error.message)
    for name, count, held_out in (("train", 5 + rank, 2), ("evaluate", 5, 2 + rank)):
        try:
            train_on(base, count, held_out)
        except BadConfig as error:
            tell(out / f"refused_by_{name}.{rank}", error.message)
    tell(out / f"before_the_end.{rank}", None)
    if rank == 1:  # in the midst of the first step
        lora_core.distributed.sum_gradients = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    run(arguments(base, rows, out / "never", "--sharding", "full"))
    tell(out / f"survived.{rank}", None)


def keep_every_checkpoint(folder: Path) -> None:
    """As a run that was killed after that step would have left it."""
    save = lora_core.launch.save_checkpoint

    def save_twice(directory: Path, *what: Any) -> None:
        save(directory, *what)
        if directory.parent.name == "of_full":
            shutil.copytree(directory, folder / directory.name / directory.name)

    lora_core.launch.save_checkpoint = save_twice


def adapted(base: Path) -> tuple[Any, Any]:
    model, tokenizer = load_base(base, device="cpu")
    inject(model, LoraConfig(r=4), seed=0)
    return model, tokenizer


def count_bytes(base: Path) -> list[int]:
    """Of the base in this process, before and after."""
    model, _ = adapted(base)
    before = base_bytes(model)
    shard_base(model)
    return [before, base_bytes(model)]


def train_on(base: Path, rows: int, held_out: int) -> None:
    model, tokenizer = adapted(base)
    examples, others = (tokenize_rows(tokenizer, make_rows(count), 100).examples for count in (rows, held_out))
    train(model, examples, TrainConfig(), eval_examples=others)


def on_two_machines(log: Path, *arguments: object) -> list[int]:
    """The exit codes of two agents; both have ended, and their processes with them. What they say is in `log`."""
    endpoint = f"127.0.0.1:{free_port()}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    launch += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={endpoint}", "--local-addr=127.0.0.1"]
    # A machine that is busy for long must not look dead.
    launch += ["--rdzv-conf=keep_alive_interval=20,keep_alive_max_attempt=15,heartbeat_timeout=120", "-m", __name__]
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = os.environ | loopback | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as said:
        command = [*launch, *map(str, arguments)]
        agents = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said) for _ in range(2)]
    try:
        return [agent.wait(timeout=600) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # which ends its process, too
        for agent in agents:
            end(agent)


def end(agent: "subprocess.Popen[bytes]") -> None:
    try:
        agent.wait(timeout=120)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(17))


@pytest.fixture(scope="module")
def alone(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("alone") / "adapter"
    torch.set_num_threads(1)
    return out, run(arguments(llama, rows, out))


@pytest.fixture(scope="module")
def folder(llama: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    codes = on_two_machines(folder / "log", llama, rows, folder)
    assert (folder / "before_the_end.1").exists(), (folder / "log").read_text()
    assert all(codes), codes  # the last run is killed
    return folder


def factors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The sum over rows is taken in another order."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-3, msg=name)


def told(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_sharded_base_gives_the_adapter_and_the_losses_of_one_process(folder: Path, alone: Any) -> None:
    out, result = alone
    assert_close(factors(folder / "full"), factors(out))
    assert_close(factors(folder / "whole"), factors(out))
    for rank in (0, 1):
        steps, *losses = told(folder / f"full.{rank}")
        assert steps == result.steps == STEPS
        assert losses == pytest.approx([result.train_loss, result.eval_loss], rel=1e-4)


def test_each_process_keeps_half_of_the_base(folder: Path) -> None:
    (before, first), (_, second) = (told(folder / f"bytes.{rank}") for rank in (0, 1))
    assert first + second == before
    assert abs(first - second) <= before / 100


def test_a_sharded_run_goes_on_with_the_same_bits(folder: Path) -> None:
    wanted, found = factors(folder / "full"), factors(folder / "resumed")
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert [path.name for path in (folder / "of_full").iterdir()] == [str(STEPS)]
    last = [folder / name / str(STEPS) / TENSORS_FILE for name in ("of_full", "saved/3")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_one_process_may_go_on_with_what_two_began(
    folder: Path, llama: Path, rows: Path, alone: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with less memory."""
    shutil.copytree(folder / "saved" / "2", tmp_path / "saved")
    somebodys = tmp_path / "saved" / "2026"
    somebodys.mkdir()
    smaller = ("--checkpoints", str(tmp_path / "saved"), "--train", "tokens_per_batch=48")
    run(arguments(llama, rows, tmp_path / "out", *smaller))
    assert_close(factors(tmp_path / "out"), factors(alone[0]))
    changed = "processes 2 → 1; sharding full → none; tokens_per_batch 96 → 48"
    assert f"goes on after step 2, with other bits: {changed}\n" in capsys.readouterr().out
    assert somebodys.is_dir()


def test_peft_says_what_we_say_with_the_adapter(folder: Path, llama: Path) -> None:
    import peft  # here, as the processes above need no PEFT

    ours, _ = load_base(llama, device="cpu")
    load_adapter(ours, folder / "full")
    base = AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, folder / "full").eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-5, rtol=1e-5)


def test_machines_with_different_rows_do_not_begin(folder: Path) -> None:
    for rank in (0, 1):
        assert told(folder / f"refused.{rank}").endswith("they differ in examples")
        for name in ("train", "evaluate"):
            assert told(folder / f"refused_by_{name}.{rank}").endswith("different rows or settings")


def test_a_killed_process_ends_those_on_other_machines(folder: Path) -> None:
    assert not list(folder.glob("survived.*"))
    assert not (folder / "never").exists()


def test_another_run_s_checkpoint_is_refused(folder: Path, llama: Path, rows: Path, tmp_path: Path) -> None:
    others = arguments(llama, rows, tmp_path, "--checkpoints", str(folder / "saved" / "1"), "--lora", "r=2")
    with pytest.raises(CheckpointMismatch, match="differs in lora"):
        run(others)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--sharding", "full"], "start with torchrun"),
        (["--train", "sharding=full"], "no setting sharding"),
        (["--lora", "r=0"], "r must be"),
    ],
)
def test_what_cannot_be_done_is_said(llama: Path, rows: Path, tmp_path: Path, more: list[str], why: str) -> None:
    with pytest.raises(LoraError, match=why):
        run(arguments(llama, rows, tmp_path, *more))


def test_a_process_joins_the_group_that_torchrun_is_starting(
    llama: Path, rows: Path, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_torchrun_would(monkeypatch)
    run(arguments(llama, rows, tmp_path / "out", "--sharding", "full"))
    assert_close(factors(tmp_path / "out"), factors(alone[0]))
    assert not dist.is_initialized()


def as_torchrun_would(monkeypatch: pytest.MonkeyPatch) -> None:
    around = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**around, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)


def test_restarts_that_would_look_for_the_dead_are_refused(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_torchrun_would(monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(BadConfig, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run(arguments(llama, rows, tmp_path))


def test_an_error_ends_the_program_with_a_sentence(llama: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="start with torchrun"):
        main(arguments(llama, rows, tmp_path, "--sharding", "full"))


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
