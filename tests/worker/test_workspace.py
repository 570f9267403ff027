"""Nothing is left behind, and nobody who lives is swept away."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.worker.depot import ROOT
from worker.workspace import WorkDir

HOLDER = """
import sys, time
from pathlib import Path
from worker.workspace import WorkDir
work = WorkDir(Path(sys.argv[1]), "holder")
(work.path / "weights").write_text("x")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_leftovers_go_when_their_worker_is_dead_and_not_before(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    work = WorkDir(tmp_path, "me")
    assert work.remove_leftovers() == 0
    assert (tmp_path / "holder" / "weights").exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    assert work.remove_leftovers() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["me", "me.lock"]
    work.close()
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_has_a_private_folder_until_it_ends(tmp_path: Path) -> None:
    work = WorkDir(tmp_path, "me")
    with pytest.raises(ValueError, match="stop"), work.attempt(uuid.UUID(int=7), 3) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "out").mkdir()
        (folder / "out" / "weights").write_text("x")
        raise ValueError("stop")
    assert list(work.path.iterdir()) == []
