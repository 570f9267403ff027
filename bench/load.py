"""Loading an adapter from disk onto a base that is in memory: `lora_core.adapter.load_adapter` against PEFT.

Both sides are in one process and read the same files from the page cache. Ours also checks that every number is finite,
that something was learned, and that every tensor has its place."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import peft

from bench.harness import Row, paired, smaller_is_better, write
from bench.live_models import build, second, seconds, write_adapters
from lora_core.adapter import load_adapter
from lora_core.inject import eject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 24], help="24 layers are 0.39 billion parameters")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--why", default="", help="sentences for the note: why a target is missed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [row for layers in options.layers for row in compare(layers, options)]
    note = (
        f"{options.dtype} Llama with the widths of Qwen2.5-0.5B, r = 16 in float32 on all linears, adapter files in "
        f"the page cache. Load average before: {load:.1f} on {os.cpu_count()} cores. {options.why}"
    )
    write("load", rows, note=note)


def compare(layers: int, options: argparse.Namespace) -> list[Row]:
    """Against PEFT as people call it, and with its quicker loading."""
    with tempfile.TemporaryDirectory(prefix="bench-load-") as name:
        model = build(layers, options.dtype)
        (adapter,) = write_adapters(model, Path(name), 1)
        theirs = second(model)
        rows = []
        for what, quick in (("PEFT", False), ("PEFT with low_cpu_mem_usage", True)):
            pair = paired(
                lambda: ours(model, adapter),
                lambda quick=quick: peer(theirs, adapter, quick=quick),
                rounds=options.rounds,
            )
            rows.append(smaller_is_better(f"load an adapter, {layers} layers, vs {what}", pair, unit="s", at_least=3))
    return rows


def ours(model: Any, adapter: Path) -> float:
    spent = seconds(lambda: load_adapter(model, adapter))
    eject(model)
    return spent


def peer(model: Any, adapter: Path, *, quick: bool) -> float:
    loaded: list[Any] = []
    spent = seconds(lambda: loaded.append(peft.PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=quick)))
    loaded[0].unload()
    return spent


if __name__ == "__main__":
    main()
