"""A process of a group that has no rows in a step takes part in it all the same."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from lora_core import distributed
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.inject import inject
from lora_core.model import load_base
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from tests.tiny import make_rows

ROOT = Path(__file__).parents[2]


def test_more_processes_than_rows_of_a_step_train_as_one(llama: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__]
    subprocess.run([*launch, str(llama), str(tmp_path)], check=True, cwd=ROOT)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def run(base: Path, out: Path) -> None:
    model, tokenizer = load_base(base, device="cpu")
    inject(model, LoraConfig(r=4), seed=0)
    config = TrainConfig(batch_size=1, max_steps=2, learning_rate=1e-2)
    train(model, tokenize_rows(tokenizer, make_rows(2), 100).examples, config)
    found = {name: value.detach() for name, value in trained_parameters(model).items()}
    torch.save(found, out / str(distributed.rank()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
