"""What every benchmark shares: paired rounds, medians with spread, and a result file that says where it ran.

Ours and the peer's run alternately in one process tree, so that a busy machine disturbs both alike."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "numpy", "safetensors", "sqlalchemy", "celery")


@dataclass(frozen=True)
class Row:
    """One line of a result table; `ratio` is peer / ours where smaller is better, ours / peer where larger is."""

    what: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    spread: str
    target: str
    reached: bool | None
    measured: str = ""  # when, where the rows of a file are of several runs

    @property
    def group(self) -> str:
        return self.what.partition(":")[0]


@dataclass(frozen=True)
class Pair:
    """The rounds of one comparison, in the order they ran."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / mine for mine, theirs in zip(self.ours, self.peer, strict=True)]


def paired(ours: Callable[[], float], peer: Callable[[], float], *, rounds: int) -> Pair:
    """Runs both `rounds` times, alternating which goes first, after one unrecorded warm-up of each."""
    ours(), peer()
    pair = Pair([], [])
    for index in range(rounds):
        runs = [(ours, pair.ours), (peer, pair.peer)]
        for run, results in runs if index % 2 == 0 else reversed(runs):
            results.append(run())
    return pair


def smaller_is_better(what: str, pair: Pair, *, unit: str, at_least: float | None = None) -> Row:
    """A row whose ratio is the median of the paired ratios peer / ours."""
    ratio = statistics.median(pair.ratios)
    return Row(
        what=what,
        ours=round(statistics.median(pair.ours), 4),
        peer=round(statistics.median(pair.peer), 4),
        unit=unit,
        ratio=round(ratio, 3),
        spread=f"{min(pair.ratios):.2f}–{max(pair.ratios):.2f} over {len(pair.ours)} rounds",
        target=f"≥ {at_least:g} ×" if at_least is not None else "none set",
        reached=ratio >= at_least if at_least is not None else None,
    )


def write(name: str, rows: Sequence[Row], *, note: str) -> Path:
    """Writes bench/results/<name>.json and prints the table."""
    result = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "note": note,
        "rows": [{key: value for key, value in asdict(row).items() if key != "measured" or value} for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    for row in rows:
        print(f"{row.what:60} {row.ours:>10g} vs {row.peer} {row.unit:8} ratio {row.ratio} ({row.spread}) {row.target}")
    return path


def earlier(name: str, *, but: Collection[str]) -> list[Row]:
    """Rows of bench/results/<name>.json that are not of the groups `but`; none of another machine or other versions."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    here, there = machine(), result["machine"]
    if result["versions"] != versions() or any(here[key] != there[key] for key in ("cpu", "cores", "memory_gib")):
        return []
    rows = [Row(**({"measured": result["date"]} | row)) for row in result["rows"]]
    return [row for row in rows if row.group not in but]


def machine() -> dict[str, str | int]:
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or "unknown",
    )
    memory = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), "0")
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "memory_gib": round(int(memory) / 2**20),
        "gpu": _gpu(),
        "system": platform.platform(terse=True),
        "load_at_end": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed_process(argv: Sequence[str]) -> tuple[float, float]:
    """Runs `python argv…` to its end: seconds of wall clock, and peak resident MiB of that process."""
    script = (
        "import resource, subprocess, sys, time; t = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, sys.executable, *argv], check=True, capture_output=True, text=True
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def _gpu() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not run on a GPU"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
