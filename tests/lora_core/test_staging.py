"""A merge that is killed leaves nothing visible, and the next one goes on with its finished files."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core import layout
from lora_core import merge as merging
from lora_core.merge import merge
from lora_core.staging import resumable_directory
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base

# Kills itself when it is told so many times that some bytes are done.
KILLED = """
import os, signal, sys
from pathlib import Path
from lora_core import layout, merge as merging
from lora_core.merge import merge
layout.BLOCK_ITEMS, layout._MIN_ROWS, merging._TASK_BYTES = 256, 1, 4096
left = int(sys.argv[4])
def kill(done, total):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
merge(*map(Path, sys.argv[1:4]), digests=True, on_progress=kill)
"""


def run_until_killed(base: Path, adapter: Path, out: Path, steps: int) -> int:
    arguments = [sys.executable, "-c", KILLED, base, adapter, out, str(steps)]
    return subprocess.run(arguments, env=os.environ | {"PYTHONPATH": "."}).returncode


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, Path, list[object]]:
    folder = tmp_path_factory.mktemp("case")
    base = make_base(folder / "base", shards=4, hidden=64)
    adapter = make_peft_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])
    return base, adapter, [merge(base, adapter, folder / "out", digests=True).files, folder / "out"]


def finished(stage: Path) -> list[str]:
    return [
        record["path"] for line in (stage / "state.jsonl").read_text().splitlines()[1:] if (record := json.loads(line))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_merge_killed_at_any_points_ends_with_the_same_digests(tmp_path, case, seed):
    base, adapter, (files, _) = case
    out, steps = tmp_path / "out", random.Random(seed).sample(range(50), 3)
    for count in steps:
        assert run_until_killed(base, adapter, out, count) == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert merge(base, adapter, out, digests=True).files == files
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_finished_files_are_kept_and_the_report_is_whole(tmp_path, monkeypatch, case):
    base, adapter, (_, whole) = case
    run_until_killed(base, adapter, tmp_path / "out", 100)
    stage = tmp_path / ".out.partial"
    done = finished(stage)
    assert done
    monkeypatch.setattr(layout, "BLOCK_ITEMS", 256)
    monkeypatch.setattr(layout, "_MIN_ROWS", 1)
    monkeypatch.setattr(merging, "_TASK_BYTES", 4096)
    before = {name: (stage / "files" / name).stat().st_ino for name in done}
    report = merge(base, adapter, tmp_path / "out", digests=True)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in done} == before
    fresh = merge(base, adapter, tmp_path / "fresh", digests=True)
    assert report == fresh
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in whole.iterdir()}


def test_a_finished_file_that_was_damaged_is_made_again(tmp_path, case):
    base, adapter, (files, _) = case
    run_until_killed(base, adapter, tmp_path / "out", 100)
    damaged = tmp_path / ".out.partial" / "files" / finished(tmp_path / ".out.partial")[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert merge(base, adapter, tmp_path / "out", digests=True).files == files


def test_what_the_kernel_held_before_the_machine_started_anew_is_not_trusted(tmp_path, case):
    base, adapter, (files, _) = case
    run_until_killed(base, adapter, tmp_path / "out", 100)
    stage = tmp_path / ".out.partial"
    first, *others = (stage / "state.jsonl").read_text().splitlines(keepends=True)
    boot = json.loads(first)["boot"]
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (stage / "state.jsonl").write_text("".join([first.replace(boot, "an earlier one"), *others]))
    kept = [(stage / "files" / name).open("rb") for name in finished(stage)]  # so that their numbers are not used again
    report = merge(base, adapter, tmp_path / "out", digests=True)
    assert kept
    assert report.files == files
    for file in kept:
        assert os.fstat(file.fileno()).st_nlink == 0
        file.close()


def test_what_was_left_of_another_merge_is_not_gone_on_with(tmp_path, case):
    base, adapter, _ = case
    run_until_killed(base, adapter, tmp_path / "out", 100)
    report = merge(base, adapter, tmp_path / "out", scale=0.5, digests=True)
    assert report.files == merge(base, adapter, tmp_path / "half", scale=0.5, digests=True).files


def test_a_base_that_changed_since_the_kill_is_merged_anew(tmp_path, case):
    _, adapter, _ = case
    base = make_base(tmp_path / "base", shards=4, hidden=64)
    run_until_killed(base, adapter, tmp_path / "out", 100)
    done = finished(tmp_path / ".out.partial")
    shard = base / next(name for name in done if name.endswith(".safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64
    shard.write_bytes(content)
    report = merge(base, adapter, tmp_path / "out", digests=True)
    assert report.files == merge(base, adapter, tmp_path / "fresh", digests=True).files


@pytest.mark.parametrize("state", [b"", b"not json", b'{"key": "k"}\n{"path": "a", "sha2'])
def test_a_state_that_was_cut_off_is_no_obstacle(tmp_path, state):
    stage = tmp_path / ".out.partial"
    (stage / "files").mkdir(parents=True)
    (stage / "state.jsonl").write_bytes(state)
    with resumable_directory(tmp_path / "out", "k") as prepared:
        assert prepared.finished("a", 0) is None
        (prepared.files / "a").write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    def enter() -> None:
        with resumable_directory(tmp_path / "out", "k"):
            pass

    with resumable_directory(tmp_path / "out", "k"), pytest.raises(FileExistsError, match="another process"):
        enter()
    assert (tmp_path / "out").is_dir()


def test_an_exception_removes_what_a_kill_left(tmp_path, case):
    base, adapter, _ = case
    run_until_killed(base, adapter, tmp_path / "out", 100)
    with pytest.raises(ZeroDivisionError):
        merge(base, adapter, tmp_path / "out", on_progress=lambda done, total: 1 // 0)
    assert list(tmp_path.iterdir()) == []
