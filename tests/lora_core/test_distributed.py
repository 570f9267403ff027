"""Two processes of one group train what one process trains: same rows per step, each its share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from lora_core import distributed
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.inject import inject
from lora_core.model import load_base
from lora_core.train import StepReport, TrainConfig, TrainResult, train
from lora_core.trainable import trained_parameters
from tests.tiny import make_rows

ROOT = Path(__file__).parents[2]
# 21 rows: some step has 5 of them, and the shares differ in size.
CONFIG = TrainConfig(
    n_epochs=2, batch_size=8, learning_rate=1e-2, tokens_per_batch=128, loraplus_lr_ratio=2.0, warmup_ratio=0.3
)


def run(base: Path, out: Path, dropout: float = 0.0) -> None:
    """Train; the first process saves what came out of it."""
    torch.set_num_threads(1)
    model, tokenizer = load_base(base, device="cpu")
    inject(model, LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout), seed=0)
    examples = tokenize_rows(tokenizer, make_rows(21), 100).examples
    reports: list[StepReport] = []
    result = train(model, examples, CONFIG, eval_examples=examples[:3], on_step=reports.append)
    factors = {name: value.detach() for name, value in trained_parameters(model).items()}
    told = [(report.loss, report.grad_norm, report.eval_loss) for report in reports]
    torch.save({"result": result, "told": told, "factors": factors}, f"{out}.{distributed.rank()}")


def together(base: Path, out: Path) -> None:
    """Three runs in two processes, of which two have dropout."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__]
    subprocess.run([*launch, str(base), str(out)], check=True, cwd=ROOT)


def end(out: Path, rank: int = 0) -> dict:
    return torch.load(f"{out}.{rank}", weights_only=False)


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run(llama, folder / "alone")
    together(llama, folder)
    return folder


def test_two_processes_reach_what_one_reaches(folder: Path) -> None:
    """Close, not bit-equal: the sum over rows is taken in another order."""
    alone, first = end(folder / "alone"), end(folder / "pair")
    for name, value in alone["factors"].items():
        torch.testing.assert_close(first["factors"][name], value, atol=2e-4, rtol=1e-3, msg=name)
    assert [told[0] for told in first["told"]] == pytest.approx([told[0] for told in alone["told"]], rel=1e-4)
    assert [told[1] for told in first["told"]] == pytest.approx([told[1] for told in alone["told"]], rel=1e-3)
    assert first["result"].eval_loss == pytest.approx(alone["result"].eval_loss, rel=1e-4)
    assert first["result"].trained_tokens == alone["result"].trained_tokens


def test_both_processes_have_the_same_bits_and_one_tells(folder: Path) -> None:
    first, second = (end(folder / "pair", rank) for rank in (0, 1))
    assert all(torch.equal(first["factors"][name], second["factors"][name]) for name in first["factors"])
    assert first["result"] == second["result"]
    assert isinstance(first["result"], TrainResult)
    assert (len(first["told"]), len(second["told"])) == (6, 0)


def test_each_row_goes_to_one_process() -> None:
    assert distributed.share(range(4), [3, 9, 5, 7]) == [1, 3, 2, 0]


def test_dropout_repeats_between_runs(folder: Path) -> None:
    first, again, plain = (end(folder / name)["factors"] for name in ("dropped", "again", "pair"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], plain[name]) for name in first)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    run(base, out / "pair")
    run(base, out / "dropped", dropout=0.3)
    run(base, out / "again", dropout=0.3)
    dist.destroy_process_group()
