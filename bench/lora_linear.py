"""One adapted linear layer, forward and backward: what LoRA costs over the bare frozen layer, ours and PEFT's.

Overheads are differences of measured times, so every round takes the three layers one after the other, many times each.
Processor time on one thread: what another process does to the clock would drown a difference of a few per cent."""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn

from bench.harness import Pair, Row, write
from lora_core.layers import LoraLinear

# tokens, in, out
SHAPES = ((1024, 576, 1536), (1024, 896, 4864), (1024, 2048, 2048))
RANK = 16
AT_MOST = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", type=int, default=6, help="forward and backward passes in a measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    dtypes = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    rows = [
        compare(shape, dtype, options.rounds, options.passes, wide=wide)
        for dtype in dtypes
        for wide in ((True,) if dtype is torch.float32 else (True, False))
        for shape in SHAPES
    ]
    write(
        "lora_linear",
        rows,
        note=f"r = {RANK}, no dropout, the input wants its gradient; ratio is ours / PEFT's, median of paired rounds. "
        "Ours trains float32 factors, and so does PEFT unless told otherwise; rows of PEFT with bfloat16 factors "
        f"are for comparison. Load average before: {load:.1f} on {os.cpu_count()} cores.",
    )


def compare(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int, passes: int, *, wide: bool) -> Row:
    """`wide`: PEFT's factors are float32, as get_peft_model makes them by default, not of the base's dtype."""
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    bare = nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(requires_grad=False)
    ours = LoraLinear(bare, path="a", r=RANK, scaling=2.0).train()
    theirs = PeftLinear(bare, "default", config=PeftConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0), r=RANK)
    cast_adapter_dtype(theirs, "default", autocast_adapter_dtype=wide)
    factors: list[Any] = [ours.lora_B, theirs.lora_B["default"].weight]
    for factor in factors:
        nn.init.normal_(factor, std=0.02)
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, dtype=dtype)
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = [bare, ours, theirs.train()]
    times = [[measure(layer, x, grad, passes) for layer in layers] for _ in range(rounds + 2)][2:]
    pair = Pair([mine - base for base, mine, _ in times], [peft - base for base, _, peft in times])
    what = f"{tokens} × {inputs} → {outputs}, {str(dtype).removeprefix('torch.')}"
    what += "" if wide else ", PEFT's factors too"
    base = statistics.median(base for base, _, _ in times)
    return overhead(f"{what}: over the bare layer's {1e3 * base:.1f} ms", pair, AT_MOST if wide else None)


def measure(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grad: torch.Tensor, passes: int) -> float:
    """Processor seconds of a pass forward and backward."""
    began = time.process_time()
    for _ in range(passes):
        x.grad = None
        torch.autograd.backward(layer(x), grad)
    return (time.process_time() - began) / passes


def overhead(what: str, pair: Pair, at_most: float | None) -> Row:
    ours, peft = statistics.median(pair.ours), statistics.median(pair.peer)
    ratios = sorted(mine / theirs for mine, theirs in zip(pair.ours, pair.peer, strict=True))
    quarter = len(ratios) // 4
    return Row(
        what=what,
        ours=round(1e3 * ours, 3),
        peer=round(1e3 * peft, 3),
        unit="ms",
        ratio=round(ours / peft, 3),
        spread=f"{ratios[quarter]:.2f}–{ratios[-1 - quarter]:.2f}, the middle half of {len(ratios)} rounds",
        target=f"≤ {at_most} ×" if at_most else "none set",
        reached=ours / peft <= at_most if at_most else None,
    )


if __name__ == "__main__":
    main()
