"""When the child's supervisor dies, and when only the thread that asked for the child ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.worker.depot import ROOT, is_alive, wait_until
from worker.child import EXIT_FAILED
from worker.child_env import child_env
from worker.process import Child
from worker.service import CHILD_ARGV

SUPERVISOR = """
import sys, time
from pathlib import Path
from worker.child_env import child_env
from worker.process import Child
from worker.service import CHILD_ARGV

home = Path(sys.argv[1])
print(Child(CHILD_ARGV, env=child_env(home, threads=1), directory=home).pid, flush=True)
time.sleep(3600)
"""


def is_set_up(pid: int) -> bool:
    """Whether `worker.child` has come to its last signal handler, which it sets after all that is tested here."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (signal.SIGUSR2 - 1) & 1)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_stopped_child_ends_with_its_killed_supervisor(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", SUPERVISOR, str(tmp_path)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        try:
            wait_until(lambda: is_set_up(child))
            os.kill(child, signal.SIGSTOP)
            wait_until(lambda: state(child) == "T")
            supervisor.kill()
            wait_until(lambda: not is_alive(child), what="the end of the stopped child")
        finally:
            supervisor.kill()
            if is_alive(child):
                os.kill(child, signal.SIGKILL)


def test_a_child_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    home.mkdir()
    workspace.mkdir()
    children: list[Child] = []
    may_end = threading.Event()

    def ask() -> None:
        children.append(Child(CHILD_ARGV, env=child_env(home, threads=1), directory=home))
        may_end.wait()

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: children)
    (child,) = children
    try:
        wait_until(lambda: is_set_up(child.pid))
        may_end.set()
        thread.join()
        wait_until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
        child.assign(workspace, lambda _: None)
        assert child.wait(60)
        assert child.returncode == EXIT_FAILED  # it looked for its task; nobody had killed it
    finally:
        child.end()
