"""One home under test: starts `up` on it and looks at what runs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg

from cli.embedded.leftovers import MARKER
from cli.embedded.postgres import postgres_url
from cli.embedded.process import ROOT
from cli.home import Home

DEADLINE = 200.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.05)


class Depot:
    """One home, the `up` processes that were started on it, and a look at what runs for it."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.output = root.parent / "output"
        self.started: list[subprocess.Popen[bytes]] = []

    def up(self, *arguments: str, ready: bool = True) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "tests.cli.toys", "up", str(self.home.root), *arguments]
        with self.output.open("ab") as output:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        self.started.append(process)
        if ready:
            self.wait_ready(process)
        return process

    def wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        wait_for(lambda: self.state().get("url") or process.poll() is not None, "ready or ended")
        assert process.poll() is None, self.said()
        working = self.home.work / str(self.children()["worker"])
        wait_for(working.exists, "the worker works")

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def state(self) -> dict:
        try:
            state = json.loads(self.home.state.read_text())
        except FileNotFoundError:
            return {}
        # A killed supervisor leaves its state behind.
        running = [process.pid for process in self.started if process.poll() is None]
        return state if state["pid"] in running else {}

    def children(self) -> dict[str, int]:
        return self.state().get("children", {})

    def guardian(self) -> psutil.Process:
        (found,) = [p for p in self.processes() if "cli.embedded.guardian" in p.cmdline()]
        return found

    def processes(self) -> list[psutil.Process]:
        """What runs for this home: the supervisor, the guardian (both hold the lock) and every child."""
        return [process for process in psutil.process_iter() if self.owns(process)]

    def owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            words = process.cmdline()
            marked = process.environ().get(MARKER) == str(self.home.root)
            return (
                marked or str(self.home.root) in words or str(self.home.postgres) in words or self.holds_lock(process)
            )
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def holds_lock(self, process: psutil.Process) -> bool:
        return any(file.path == str(self.home.lock) for file in process.open_files())

    def query(self, statement: str) -> tuple | None:
        url = postgres_url(self.home.sockets).replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(statement).fetchone()

    def stop(self, process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> int:
        process.send_signal(number)
        return process.wait(DEADLINE)


def clean(depot: Depot) -> Iterator[Depot]:
    yield depot
    for process in depot.processes():
        process.kill()
    for started in depot.started:
        started.wait()
