"""What is left of memory is the less of what machine and container have; what is not told is not made up."""

import os
from pathlib import Path

import pytest

from worker.memory import available_bytes, oom_kills, resident_bytes


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 8_000_000 * 1024), ("1000000", 600_000), ("500000", 100_000), ("300000", 0)]
)
def test_the_container_limits_what_the_machine_has(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 100000\n")
    assert available_bytes(tmp_path, tmp_path) == expected


def test_where_nobody_says_it_is_unknown(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_the_kernels_count_of_those_it_killed_is_read(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\npgfault 9\n")
    assert oom_kills(tmp_path) == 3


def test_what_a_process_holds_is_read() -> None:
    assert resident_bytes(os.getpid()) > 2**20
    assert resident_bytes(2**30) == 0
