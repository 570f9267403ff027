"""A process of its own that plans a step, takes it, and prints what was planned and the most that the process held."""

import json
import sys
from pathlib import Path

import torch

from lora_core.config import LoraConfig
from lora_core.data import Example
from lora_core.inject import inject
from lora_core.memory import plan_memory
from lora_core.model import load_base
from lora_core.train import TrainConfig, train

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
LABELLED = 0.4


def example(length: int) -> Example:
    """A row whose last tokens are labelled."""
    ids = torch.arange(3, 3 + length, dtype=torch.int32).numpy()
    labels = ids.copy()
    labels[: round((1 - LABELLED) * length)] = -100
    return Example(ids, labels)


def take_step(base: Path, lengths: list[int], config: TrainConfig) -> None:
    model, _ = load_base(base, "float32", device="cpu")
    inject(model, LORA, seed=0)
    train(model, [example(length) for length in lengths], config)


def most_held() -> int:
    """Bytes of this process in main memory at its largest so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def main(base: Path, warm: Path, lengths: list[int]) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(batch_size=len(lengths), max_steps=1)
    take_step(warm, [8, 6], config)  # the libraries' code is in memory then
    plan = plan_memory(base, LORA, config, lengths, labelled=LABELLED, dtype=torch.float32)
    take_step(base, lengths, config)
    json.dump({"total": plan.total, "step": plan.step, "held": most_held()}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
