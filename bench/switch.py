"""Switching the task of a model in memory, and mixing tasks within a batch: `lora_core.live` against PEFT.

Both sides are in one process, on copies of one model, and read the same files from the page cache."""

import argparse
import os
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

from bench.harness import Row, paired, smaller_is_better, write
from bench.live_models import build, second, seconds, write_adapters
from lora_core.live import LiveModel

Action = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16, help="24 layers are 0.39 billion parameters")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merge-rounds", type=int, default=1, help="PEFT takes many seconds to merge")
    parser.add_argument("--rows", type=int, default=8, help="of the mixed batch")
    parser.add_argument("--why", default="", help="sentences for the note: why a target is missed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-switch-") as name:
        model = build(options.layers, options.dtype)
        adapters = write_adapters(model, Path(name), 4)
        theirs = second(model)
        rows = from_disk(model, theirs, adapters, options) + in_memory(model, theirs, adapters, options)
    note = (
        f"{options.dtype} Llama with the widths of Qwen2.5-0.5B, {options.layers} layers, r = 16 in float32 on all "
        f"linears. Load average before: {load:.1f} on {os.cpu_count()} cores. {options.why}"
    )
    write("switch", rows, note=note)


def from_disk(model: Any, theirs: Any, adapters: list[Path], options: argparse.Namespace) -> list[Row]:
    """Ours with two adapters in memory, and with one that is read each time, against PEFT, which reads each time."""
    live = LiveModel(model)
    for number in (0, 1):
        live.load(str(number), adapters[number])
    names, files = cycle(["0", "1"]), cycle(adapters[:2])
    wrapped = [peft.PeftModel.from_pretrained(theirs, adapters[0])]
    other = cycle(adapters[:2])

    def read() -> None:
        live.replace("0", next(files))
        live.use("0")

    def hotswap() -> None:
        hotswap_adapter(wrapped[0], str(next(other)), adapter_name="default", torch_device="cpu")

    def unload_and_load() -> None:
        base = wrapped[0].unload()
        wrapped[0] = peft.PeftModel.from_pretrained(base, next(other), low_cpu_mem_usage=True)

    use: Action = lambda: live.use(next(names))  # noqa: E731  beside its peers
    rows = [
        compare("switch, adapters in memory, vs PEFT hotswap", use, hotswap, options.rounds, 100, at_least=5),
        compare(
            "switch, adapters in memory, vs PEFT unload + load", use, unload_and_load, options.rounds, 100, at_least=5
        ),
        compare("switch, adapter on disk, vs PEFT hotswap", read, hotswap, options.rounds, at_least=5),
        compare("switch, adapter on disk, vs PEFT unload + load", read, unload_and_load, options.rounds, at_least=5),
    ]
    wrapped[0].unload()
    for name in live.adapters:
        live.drop(name)
    return rows


def in_memory(model: Any, theirs: Any, adapters: list[Path], options: argparse.Namespace) -> list[Row]:
    """All adapters in memory on both sides."""
    live = LiveModel(model)
    wrapped = peft.PeftModel.from_pretrained(theirs, adapters[0], adapter_name="0", low_cpu_mem_usage=True)
    for number, adapter in enumerate(adapters):
        live.load(str(number), adapter)
        if number:
            wrapped.load_adapter(adapter, adapter_name=str(number), low_cpu_mem_usage=True)
    wrapped.eval()
    names, others = cycle(sorted(live.adapters)), cycle(sorted(live.adapters))

    def merge_the_next() -> None:
        wrapped.unmerge_adapter()
        wrapped.set_adapter(next(others))
        wrapped.merge_adapter()

    def set_the_next() -> None:
        wrapped.set_adapter(next(others))

    use: Action = lambda: live.use(next(names))  # noqa: E731  beside its peers
    merge: Action = lambda: live.merge(next(names))  # noqa: E731  beside its peers
    rows = [compare("switch, both in memory, vs PEFT set_adapter", use, set_the_next, options.rounds, 100)]
    wrapped.merge_adapter()
    rows.append(
        compare("merged switch W0 + B'A', vs PEFT unmerge + merge", merge, merge_the_next, options.merge_rounds)
    )
    wrapped.unmerge_adapter()
    live.use(None)
    live.free_buffers()
    for tokens, what in ((32, "32 tokens a row"), (1, "one token a row")):
        rows.append(mixed(live, wrapped, what, tokens, options))
    return rows


def mixed(live: LiveModel, wrapped: Any, what: str, tokens: int, options: argparse.Namespace) -> Row:
    """A forward pass in which adapters take turns by rows."""
    chosen = [str(row % 4) for row in range(options.rows)]
    batch = torch.randint(0, 32_000, (options.rows, tokens), generator=torch.Generator().manual_seed(0))
    with live.rows(chosen):
        return compare(
            f"mixed batch, {options.rows} rows, 4 adapters, {what}, vs PEFT",
            lambda: live.model(batch),
            lambda: wrapped(batch, adapter_names=chosen),
            options.rounds,
        )


def compare(
    what: str, ours: Action, peer: Action, rounds: int, times: int = 1, *, at_least: float | None = None
) -> Row:
    """A row of milliseconds. Ours is called `times` times in each round where one call is too short for the clock."""
    pair = paired(lambda: 1000 * seconds(ours, times), lambda: 1000 * seconds(peer), rounds=rounds)
    return smaller_is_better(what, pair, unit="ms", at_least=at_least)


if __name__ == "__main__":
    main()
