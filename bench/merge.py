"""Merging an adapter into its base: `lora_core.merge` against PEFT and against `cp -r`, in time and memory.

Every side is a whole process that ends with a complete checkpoint folder on the same disk, the base in the page cache.
The folder a side wrote before is removed first: all write fresh files (ours reserves their blocks at once), and nobody
waits for the disk. Ours also computes the SHA-256 of every file and what rounding did to every tensor."""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
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
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:4]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""
# Layers, and with a small vocabulary the gigabytes that they make.
GROWTH = (1, 5, 23, 46)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="against cp -r; against PEFT three")
    parser.add_argument("--layers", type=int, default=16, help="16 layers are 0.8 billion parameters, 1.6 GB")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as name:
        folder = Path(name)
        rows = compare(folder, options.layers, options.rounds) + growth(folder)
    note = (
        f"bf16 Llama, hidden 2048, {options.layers} layers, shards of 500 MB, r = 16 on all linears; float64 sums, "
        f"fresh files, no fsync on any side. Load average before: {load:.1f} on {os.cpu_count()} cores. "
        f"A merge keeps both cores busy (arithmetic, SHA-256 and statistics), cp -r part of one: what misses a target "
        f"against cp is the SHA-256 of the output, whose time has its own row, and the neighbours."
    )
    write("merge", rows, note=note)


def compare(folder: Path, layers: int, rounds: int) -> list[Row]:
    """Against PEFT and `cp -r`, on a model with a vocabulary of 32 000."""
    from tests.tiny import make_tokenizer

    base, adapter = (
        write_base(folder / "base", layers=layers, vocab=32_000),
        write_adapter(folder / "lora", layers=layers),
    )
    make_tokenizer(base)
    peaks: dict[str, list[float]] = {"ours": [], "peft": []}

    def timed(side: str, code: str) -> Callable[[], float]:
        def run() -> float:
            seconds, peak = process(code, base, adapter, folder / side)
            peaks[side].append(peak)
            return seconds

        return run

    against_copy = paired(timed("ours", OURS), lambda: copy(base, folder / "copy"), rounds=rounds)
    digest = sha256_seconds(folder / "ours")
    peaks["ours"].clear()
    against_peft = paired(timed("ours", OURS), timed("peft", PEFT), rounds=3)
    memory = Pair(peaks["ours"][1:], peaks["peft"][1:])
    for name in ("base", "lora", "ours", "peft", "copy"):
        shutil.rmtree(folder / name)
    return [
        smaller_is_better("merge to disk vs PEFT, whole process", against_peft, unit="s", at_least=10),
        smaller_is_better("merge to disk vs cp -r of the base", against_copy, unit="s", at_least=0.4),
        Row("of which SHA-256 of the output, on its own thread", digest, None, "s", None, "1 run", "none set", None),
        smaller_is_better("peak resident memory of the process vs PEFT", memory, unit="MiB"),
    ]


def growth(folder: Path) -> list[Row]:
    """Time and peak memory of bases that differ in nothing but the number of layers."""
    times: list[float] = []
    peaks: list[float] = []
    gigabytes: list[float] = []
    rows: list[Row] = []
    for layers in GROWTH:
        base, adapter = (
            write_base(folder / "base", layers=layers, vocab=2048),
            write_adapter(folder / "lora", layers=layers),
        )
        runs = [process(OURS, base, adapter, folder / "out") for _ in range(3)]
        seconds = [second for second, _ in runs]
        gigabytes.append(sum(path.stat().st_size for path in base.iterdir()) / 1e9)
        times.append(statistics.median(seconds))
        peaks.append(max(peak for _, peak in runs))
        spread = f"{min(seconds):.2f}–{max(seconds):.2f} over {len(seconds)} rounds"
        rows.append(Row(f"merge of {gigabytes[-1]:.1f} GB", times[-1], None, "s", None, spread, "none set", None))
        for name in ("base", "lora", "out"):
            shutil.rmtree(folder / name)
    sizes = [f"{size:.1f}" for size in gigabytes]
    early, late = ((times[i + 1] - times[i]) / (gigabytes[i + 1] - gigabytes[i]) for i in (0, len(GROWTH) - 2))
    return [
        *rows,
        Row(
            f"seconds per further GB, {sizes[-2]} to {sizes[-1]} GB vs {sizes[0]} to {sizes[1]} GB",
            round(late, 3),
            round(early, 3),
            "s/GB",
            round(early / late, 3),
            "of the medians above",
            "ratio 0.67–1.5: linear",
            2 / 3 <= early / late <= 1.5,
        ),
        Row(
            f"peak resident memory, {sizes[-1]} GB vs {sizes[1]} GB",
            round(peaks[-1], 1),
            round(peaks[1], 1),
            "MiB",
            round(peaks[1] / peaks[-1], 3),
            f"{min(peaks):.0f}–{max(peaks):.0f} over {len(GROWTH)} sizes",
            "≤ 150, ratio 0.9–1.1",
            peaks[-1] <= 150 and 0.9 <= peaks[1] / peaks[-1] <= 1.1,
        ),
    ]


def process(code: str, base: Path, adapter: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a process that merges."""
    shutil.rmtree(out, ignore_errors=True)
    return timed_process(["-c", code, str(base), str(adapter), str(out)])


def copy(base: Path, out: Path) -> float:
    """Seconds of `cp -r`."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    return time.perf_counter() - begin


def sha256_seconds(directory: Path) -> float:
    """Of all files, one after the other."""
    begin = time.perf_counter()
    for path in directory.iterdir():
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return round(time.perf_counter() - begin, 4)


if __name__ == "__main__":
    main()
