"""Merging an adapter into its base: `lora_core.merge` against PEFT and against `cp -r`, in time and memory.

Every side is a whole process that ends with a complete checkpoint folder on the same disk, the base in the page cache.
The folder a side wrote before is removed first, and what the other side wrote is brought to the disk: all write fresh
files (ours reserves their blocks at once), and nobody waits for the disk. Ours also measures what rounding did to a
part of every tensor. It hashes nothing, like the others; what `digests=True` adds, for a merge that is stored or
compared, is a row of its own."""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.checkpoints import write_adapter, write_base
from bench.harness import Pair, Row, paired, smaller_is_better, timed_process, write

# As the command line and the worker do it: OpenBLAS is told not to start threads of its own.
OURS = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from pathlib import Path
from lora_core.merge import merge
merge(*map(Path, sys.argv[1:4]))
"""
WITH_DIGESTS = OURS.replace("[1:4])", "[1:4]), digests=True")
COMMAND = """
import sys
from cli.main import app
base, adapter, out = sys.argv[1:4]
app(["merge", "--base", base, "--adapter", adapter, "--out", out])
"""
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:4]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
# Layers: with a small vocabulary 0.1, 0.5, 2 and 4 GB.
GROWTH = (1, 5, 23, 46)
BYTES_PER_LAYER = 88e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="against cp -r")
    parser.add_argument("--peft-rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=16, help="16 layers are 0.8 billion parameters, 1.6 GB")
    parser.add_argument("--growth", type=int, nargs="+", default=GROWTH, help="layers of growing bases")
    parser.add_argument("--why", default="", help="sentences for the note: why a target is missed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as name:
        folder = Path(name)
        rows = compare(folder, options) + growth(folder, options.growth)
    note = (
        f"bf16 Llama, hidden 2048, {options.layers} layers, shards of 500 MB, r = 16 on all linears; float64 sums, "
        f"fresh files, no fsync on any side. Load average before: {load:.1f} on {os.cpu_count()} cores; above the "
        f"number of cores the clock says little, and processor time more. {options.why}"
    )
    write("merge", rows, note=note)


def compare(folder: Path, options: argparse.Namespace) -> list[Row]:
    """Against PEFT and `cp -r`, on a model with a vocabulary of 32 000."""
    from tests.tiny import make_tokenizer

    base = write_base(folder / "base", layers=options.layers, vocab=32_000)
    adapter = write_adapter(folder / "lora", layers=options.layers)
    make_tokenizer(base)
    ours, peft = Process(OURS, base, adapter, folder / "ours"), Process(PEFT, base, adapter, folder / "peft")
    against_copy = paired(ours.run, lambda: copy(base, folder / "copy"), rounds=options.rounds)
    ours.forget()
    against_peft = paired(ours.run, peft.run, rounds=options.peft_rounds)
    variants = {
        "with the SHA-256 of every file": WITH_DIGESTS,
        "as `lora-depot merge`": COMMAND,
    }
    others = [
        variant(what, Process(code, base, adapter, folder / "ours"), options.rounds) for what, code in variants.items()
    ]
    for name in ("base", "lora", "ours", "peft", "copy"):
        shutil.rmtree(folder / name)
    cpu, memory = Pair(ours.cpu[1:], peft.cpu[1:]), Pair(ours.peaks[1:], peft.peaks[1:])
    return [
        smaller_is_better("merge to disk vs PEFT, whole process", against_peft, unit="s", at_least=10),
        smaller_is_better("processor time of the same two processes", cpu, unit="s"),
        smaller_is_better("peak resident memory of the same two processes", memory, unit="MiB"),
        smaller_is_better("merge to disk vs cp -r of the base", against_copy, unit="s", at_least=0.4),
        *others,
    ]


def variant(what: str, process: "Process", rounds: int) -> Row:
    """The same merge otherwise: seconds."""
    seconds = [process.run() for _ in range(rounds)]
    spread = f"{min(seconds):.2f}–{max(seconds):.2f} over {rounds} rounds"
    return Row(f"the same {what}", round(statistics.median(seconds), 3), None, "s", None, spread, "none set", None)


def growth(folder: Path, layer_counts: Sequence[int]) -> list[Row]:
    """Time and peak memory of bases that differ in nothing but the number of layers."""
    needed = 2.2 * max(layer_counts) * BYTES_PER_LAYER
    if (free := shutil.disk_usage(folder).free) < needed:
        sys.exit(f"{needed / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free: choose fewer layers (--growth)")
    cpu: list[float] = []
    clock: list[float] = []
    peaks: list[float] = []
    gigabytes: list[float] = []
    rows: list[Row] = []
    for layers in layer_counts:
        base, adapter = (
            write_base(folder / "base", layers=layers, vocab=2048),
            write_adapter(folder / "lora", layers=layers),
        )
        process = Process(OURS, base, adapter, folder / "out")
        seconds = [process.run() for _ in range(3)]
        gigabytes.append(sum(path.stat().st_size for path in base.iterdir()) / 1e9)
        cpu.append(statistics.median(process.cpu))
        clock.append(statistics.median(seconds))
        peaks.append(max(process.peaks))
        spread = f"{min(seconds):.2f}–{max(seconds):.2f} over {len(seconds)} rounds"
        rows.append(
            Row(f"merge of {gigabytes[-1]:.1f} GB", round(clock[-1], 3), None, "s", None, spread, "none set", None)
        )
        for name in ("base", "lora", "out"):
            shutil.rmtree(folder / name)
    sizes = [f"{size:.1f}" for size in gigabytes]
    return [
        *rows,
        slopes("seconds", gigabytes, clock, wanted=True),
        slopes("processor seconds", gigabytes, cpu, wanted=False),
        Row(
            f"peak resident memory, {sizes[-1]} GB vs {sizes[1]} GB",
            round(peaks[-1], 1),
            round(peaks[1], 1),
            "MiB",
            round(peaks[1] / peaks[-1], 3),
            f"{min(peaks):.0f}–{max(peaks):.0f} over {len(layer_counts)} sizes",
            "≤ 150, ratio 0.9–1.1",
            peaks[-1] <= 150 and 0.9 <= peaks[1] / peaks[-1] <= 1.1,
        ),
    ]


def slopes(what: str, gigabytes: Sequence[float], seconds: Sequence[float], *, wanted: bool) -> Row:
    """What a further GB takes among the largest against what it takes among the smallest; `wanted` to be the same."""
    early, late = ((seconds[n] - seconds[n - 1]) / (gigabytes[n] - gigabytes[n - 1]) for n in (1, len(seconds) - 1))
    sizes = [f"{size:.1f}" for size in gigabytes]
    return Row(
        f"{what} per further GB, {sizes[-2]} to {sizes[-1]} GB vs {sizes[0]} to {sizes[1]} GB",
        round(late, 3),
        round(early, 3),
        "s/GB",
        round(early / late, 3),
        "of medians over 3 rounds",
        "ratio 0.67–1.5: linear" if wanted else "none set",
        2 / 3 <= early / late <= 1.5 if wanted else None,
    )


class Process:
    """Runs of one merging program, and what each took."""

    def __init__(self, code: str, base: Path, adapter: Path, out: Path) -> None:
        self._argv, self._out = ["-c", code, str(base), str(adapter), str(out)], out
        self.forget()

    def forget(self) -> None:
        self.cpu: list[float] = []
        self.peaks: list[float] = []

    def run(self) -> float:
        """Seconds of wall clock; processor seconds and peak MiB are noted."""
        clear(self._out)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, peak = timed_process(self._argv)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        self.peaks.append(peak)
        return seconds


def copy(base: Path, out: Path) -> float:
    """Seconds of `cp -r`."""
    clear(out)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    return time.perf_counter() - begin


def clear(out: Path) -> None:
    """Nothing is there, and no bytes of an earlier run are still to be written."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


if __name__ == "__main__":
    main()
