"""A training step: `lora_core.train` against PEFT + TRL's SFTTrainer, same base, adapter, rows, dtype and seed.

Each side is a process of its own with its model loaded; they take their steps in turn, so that a busy machine disturbs
both alike. Rows differ in length: TRL pads them (its padding-free mode needs a kernel that processors have not), ours
share a row. TRL runs in its fastest setting, without activation checkpointing; its loss is "nll", which since 1.16 is
the chunked one. Both sides' losses must agree, or there is no result. Shapes and dtypes can be measured
one at a time: what is not measured stays in the file, if it is of the same machine and versions."""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness import Pair, Row, earlier, write

# Relative difference of two losses that still count as equal: sums in another order, then rounding to the dtype.
CLOSE = {"float32": 1e-3, "bfloat16": 1e-2}
FASTER = {"float32": 2.0, "bfloat16": 2.5}
# Its default for bfloat16 is autocast, which was measured to be no slower than the plain dtype.
PEERS = {"float32": "trl", "bfloat16": "trl_autocast"}

WRITE_BASE = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from lora_core.adapter import save_adapter
from lora_core.config import LoraConfig
from lora_core.inject import inject
from tests.tiny import make_tokenizer, randomize_adapter
folder, dtype, settings = Path(sys.argv[1]), getattr(torch, sys.argv[2]), eval(sys.argv[3])
torch.manual_seed(0)
config = AutoConfig.for_model(**settings, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=2)
model = AutoModelForCausalLM.from_config(config, dtype=dtype)
model.save_pretrained(folder / "base")
make_tokenizer(folder / "base")
adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
inject(model, adapter, 0)
save_adapter(model, adapter, folder / "adapter")
randomize_adapter(folder / "adapter", scale=0.02)
"""


@dataclass(frozen=True)
class Shape:
    """A model and the lengths of the rows of a step."""

    name: str
    settings: dict[str, Any]
    lengths: Sequence[int]

    @property
    def padding(self) -> float:
        return 1 - sum(self.lengths) / (len(self.lengths) * max(self.lengths))


def settings(family: str, *sizes: int, tie: bool) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "model_type": family,
        **dict(zip((*names, "vocab_size"), sizes, strict=True)),
        "tie_word_embeddings": tie,
    }


SHAPES = (
    Shape("8 × 512", settings("llama", 512, 1376, 8, 8, 8, 32_000, tie=False), (512, 430, 350, 270)),
    Shape("0.13B-shaped", settings("llama", 576, 1536, 30, 9, 3, 49_152, tie=True), (256, 215, 175, 135)),
    Shape("0.5B-shaped", settings("qwen2", 896, 4864, 24, 14, 2, 151_936, tie=True), (192, 160, 130, 100)),
)


class Side:
    """One subject process."""

    def __init__(self, name: str, folder: Path, dtype: str, shape: Shape, steps: int) -> None:
        argv = [sys.executable, "-m", "bench.train_subject", name, str(folder / "base"), str(folder / "adapter")]
        argv += ["--dtype", dtype, "--steps", str(steps), "--lengths", *map(str, shape.lengths)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        self._log = (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.steps: list[dict[str, float]] = []

    def load(self) -> None:
        self.loaded = self._read()["loaded"]

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.steps.append(self._read())

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def of(self, what: str) -> list[float]:
        """Of every step but the first, which warms up."""
        return [step[what] for step in self.steps[1:]]

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("#"):
                return dict(json.loads(line[1:]))
        self._log.seek(0)
        raise SystemExit(self._log.read()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
    parser.add_argument("--dtypes", nargs="+", default=dtypes())
    parser.add_argument("--why", default="", help="sentences for the note: why a target is missed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    measured = f"{datetime.now(UTC).date().isoformat()}, load average before: {load:.1f} on {os.cpu_count()} cores"
    rows: list[Row] = []
    for shape in (SHAPES[index] for index in options.shapes):
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
                rows += compare(shape, dtype, Path(folder), options.rounds)
    note = (
        "r = 16 on all linears, no dropout, AdamW, 30 % of each row labelled, one batch of rows of the lengths named. "
        f"{', '.join(f'{s.name}: {list(s.lengths)}, {s.padding:.0%} padding in TRL' for s in SHAPES)}. Tokens are "
        "without padding. Peak memory is that of the process during a step, its model included; what the step adds to "
        f"the loaded process is beside it. Not run on a GPU. Processor time says more where the load was above the "
        f"number of cores. {options.why}"
    )
    order = [f"{shape.name}, {dtype}" for shape in SHAPES for dtype in FASTER]
    rows = [replace(row, measured=measured) for row in rows] + earlier("train", but={row.group for row in rows})
    write("train", sorted(rows, key=lambda row: order.index(row.group)), note=note)


def dtypes() -> list[str]:
    import torch

    return ["float32", "bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["float32"]


def compare(shape: Shape, dtype: str, folder: Path, rounds: int) -> list[Row]:
    """The rows of one table: speed, processor time and memory of both sides' steps."""
    subprocess.run(
        [sys.executable, "-c", WRITE_BASE, str(folder), dtype, repr(shape.settings)], check=True, capture_output=True
    )
    ours, peer = take_steps(["ours", PEERS[dtype]], folder, dtype, shape, rounds)
    (thrifty,) = take_steps(["trl_checkpointing"], folder, dtype, shape, 1)
    for mine, theirs in zip(ours.of("loss"), peer.of("loss"), strict=True):
        if not math.isclose(mine, theirs, rel_tol=CLOSE[dtype]):
            raise SystemExit(f"{shape.name}, {dtype}: the losses differ, {mine} and {theirs}")
    what, tokens = f"{shape.name}, {dtype}", sum(shape.lengths)
    return [
        speed(f"{what}: tokens a second", Pair(ours.of("seconds"), peer.of("seconds")), tokens, FASTER[dtype]),
        speed(f"{what}: tokens a second of processor time", Pair(ours.of("cpu"), peer.of("cpu")), tokens, None),
        memory(f"{what}: peak memory, model included", max(ours.of("peak")), max(peer.of("peak")), at_most=0.5),
        memory(
            f"{what}: what the step adds to it",
            max(ours.of("peak")) - ours.loaded,
            max(peer.of("peak")) - peer.loaded,
            at_most=0.5,
        ),
        memory(f"{what}: peak memory vs TRL with checkpointing", max(ours.of("peak")), max(thrifty.of("peak"))),
    ]


def take_steps(names: Sequence[str], folder: Path, dtype: str, shape: Shape, rounds: int) -> list[Side]:
    sides = [Side(name, folder, dtype, shape, rounds + 2) for name in names]
    try:
        for side in sides:
            side.load()
        for index in range(rounds + 1):
            for side in sides if index % 2 else sides[::-1]:
                side.step()
    finally:
        for side in sides:
            side.end()
    return sides


def speed(what: str, pair: Pair, tokens: int, at_least: float | None) -> Row:
    ratio = statistics.median(pair.ratios)
    return Row(
        what=what,
        ours=round(tokens / statistics.median(pair.ours), 1),
        peer=round(tokens / statistics.median(pair.peer), 1),
        unit="tokens/s",
        ratio=round(ratio, 3),
        spread=f"{min(pair.ratios):.2f}–{max(pair.ratios):.2f} over {len(pair.ours)} rounds",
        target=f"≥ {at_least:g} ×" if at_least else "none set",
        reached=ratio >= at_least if at_least else None,
    )


def memory(what: str, ours: float, peer: float, at_most: float | None = None) -> Row:
    """A row whose ratio is ours / peer."""
    return Row(
        what=what,
        ours=round(ours),
        peer=round(peer),
        unit="MiB",
        ratio=round(ours / peer, 3),
        spread="largest of all rounds",
        target=f"≤ {at_most:g} ×" if at_most else "none set",
        reached=ours / peer <= at_most if at_most else None,
    )


if __name__ == "__main__":
    main()
