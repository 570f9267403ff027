"""Starts the service's own entry points in moments: everything they import is imported once, then each is a fork.

One JSON object per line of stdin says what to run; the answer is its process id. The end of stdin ends everything."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1
CELERY = ["worker", "-P", "threads", "-c", "2", "--without-gossip", "--without-mingle", "--without-heartbeat"]


def work() -> None:
    from tests.faults.toy_app import app

    app.worker_main(CELERY)


def serve(port: int) -> None:
    import uvicorn

    uvicorn.run("api.main:create_app", factory=True, http="httptools", port=port, access_log=False)


def run(order: dict[str, Any]) -> None:
    """In the fork: a process like any that a shell starts; but it does not outlive a test run that was killed."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, log, log)):
        os.dup2(descriptor, number)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(order["env"])
    status = 1
    try:
        serve(order["port"]) if order["what"] == "api" else work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def bury(_number: int, _frame: FrameType | None) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    import uvicorn  # noqa: F401
    from celery.apps import worker as celery_worker
    from celery.bin import celery as celery_command

    import api.main  # noqa: F401 - these take long, and are what this process is for
    import worker.service

    del celery_worker, celery_command, worker
    signal.signal(signal.SIGCHLD, bury)
    answer("ready")
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            run(order)
        answer(str(pid))


class Zygote:
    """The process above, as a test holds it."""

    def __init__(self, folder: Path, log: Path) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("DEPOT_")}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        argv = [sys.executable, "-m", "tests.faults.zygote"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("ab") as file:
            self._process = subprocess.Popen(argv, cwd=folder, env=env, stderr=file, **pipes)
        assert self._answer() == "ready", log.read_text()

    def fork(self, what: str, *, env: Mapping[str, str], log: Path, port: int = 0) -> "Forked":
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "env": dict(env), "log": str(log), "port": port}) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._answer()))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Forked:
    """A process of the service."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    @property
    def alive(self) -> bool:
        try:
            return self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def signal(self, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(60)

    def wait(self, seconds: float) -> None:
        """Until it is gone; psutil.TimeoutExpired."""
        self._process.wait(seconds)

    def children(self) -> list[psutil.Process]:
        try:
            return self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def open_files(self) -> list[str]:
        return [file.path for file in self._process.open_files()]


if __name__ == "__main__":
    main()
