"""Starts children in order, starts again those that end, stops them in reverse order."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cli.embedded.leftovers import MARKER
from cli.embedded.process import (
    ROOT,
    ChildSpec,
    EmbeddedError,
    ending,
    kill_group,
    open_log,
    rotate,
    spawn,
    stop,
    tail,
    wait_ready,
)
from cli.home import Home, write_json

FIRST_DELAY = 1.0
LONGEST_DELAY = 30.0
# A child that ran this long was healthy: its next end counts as the first.
HEALTHY_SECONDS = 60.0
LOOK_EVERY = 0.1


@dataclass
class Child:
    """A child that should be running, and what is known about its last ends."""

    spec: ChildSpec
    process: subprocess.Popen[bytes] | None
    started: float
    delay: float = FIRST_DELAY
    due: float = 0.0


class Supervisor:
    """Owns every process of one home, through a guardian that ends them should this process be killed."""

    def __init__(self, home: Home, lock: int, say: Callable[[str], None]) -> None:
        self.home = home
        self.url: str | None = None
        self._lock = lock
        self._say = say
        self._children: list[Child] = []
        self._start_guardian()

    # ── the guardian ─────────────────────────────────────────────────────────────────────────────

    def _start_guardian(self) -> None:
        with open_log(self.home.log("guardian")) as log:
            self._guardian = subprocess.Popen(
                [sys.executable, "-m", "cli.embedded.guardian"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[self._lock],
            )
        for child in self._children:
            if child.process is not None:
                self._tell_guardian(f"+{child.process.pid} {int(child.spec.stop_signal)}\n")

    @property
    def _pipe(self) -> int:
        if self._guardian.stdin is None:
            raise AssertionError("the guardian is started with a pipe")
        return self._guardian.stdin.fileno()

    def _tell_guardian(self, line: str) -> None:
        # A guardian that is gone is replaced by `watch`, and its successor is told everything.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        """After `process` was seen to end: nothing of its session may stay, and its number is free again."""
        kill_group(process.pid)
        self._tell_guardian(f"-{process.pid}\n")

    # ── starting ─────────────────────────────────────────────────────────────────────────────────

    def start(self, spec: ChildSpec) -> None:
        """Starts a child that is to run until `stop_all`. Returns when it is ready; EmbeddedError, and it is gone."""
        rotate(spec.log)
        process = self._spawn(spec)
        child = Child(spec, process, time.monotonic())
        self._children.append(child)
        self.save_state()
        try:
            wait_ready(spec, process)
        except EmbeddedError:
            stop(spec, process)
            self._forget(process)
            self._children.remove(child)
            raise

    def _spawn(self, spec: ChildSpec, *, capture: bool = False) -> subprocess.Popen[bytes]:
        marked = replace(spec, env={**spec.env, MARKER: str(self.home.root)})
        return spawn(marked, guardian=self._pipe, capture=capture)

    def run_once(self, spec: ChildSpec) -> str:
        """Runs a child to its end and returns what it printed; raises EmbeddedError when it fails."""
        process = self._spawn(spec, capture=True)
        try:
            printed, _ = process.communicate()
        finally:
            stop(spec, process)
            self._forget(process)
        if process.returncode != 0:
            raise EmbeddedError(f"{spec.name} failed ({ending(process.returncode)}).\n{tail(spec.log)}")
        return printed.decode()

    def save_state(self) -> None:
        children = {child.spec.name: child.process.pid for child in self._children if child.process}
        write_json(self.home.state, {"pid": os.getpid(), "url": self.url, "children": children})

    # ── running ──────────────────────────────────────────────────────────────────────────────────

    def watch(self) -> None:
        """Keeps everything running, for ever; a signal handler ends it by raising."""
        while True:
            if self._guardian.poll() is not None:
                self._start_guardian()
            for child in self._children:
                self._tend(child)
            time.sleep(LOOK_EVERY)

    def _tend(self, child: Child) -> None:
        if child.process is None:
            if time.monotonic() >= child.due:
                self._start_again(child)
        elif child.process.poll() is not None:
            self._note_end(child, child.process)

    def _note_end(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self._forget(process)
        if time.monotonic() - child.started > HEALTHY_SECONDS:
            child.delay = FIRST_DELAY
        child.process, child.due = None, time.monotonic() + child.delay
        how = ending(process.returncode)
        self._say(f"{child.spec.name} stopped ({how}); starting it again in {child.delay:.0f} s. See {child.spec.log}")
        child.delay = min(child.delay * 2, LONGEST_DELAY)

    def _start_again(self, child: Child) -> None:
        try:
            child.process = self._spawn(child.spec)
        except OSError as error:
            child.due = time.monotonic() + child.delay
            self._say(f"{child.spec.name} could not be started: {error}. Trying again in {child.delay:.0f} s.")
            child.delay = min(child.delay * 2, LONGEST_DELAY)
            return
        child.started = time.monotonic()
        # A full disk must not keep a child from running: the numbers in the state file only inform.
        with contextlib.suppress(OSError):
            self.save_state()

    # ── stopping ─────────────────────────────────────────────────────────────────────────────────

    def stop_all(self) -> None:
        """Stops the children, the last started first, each in its own way."""
        for child in reversed(self._children):
            if child.process is not None:
                stop(child.spec, child.process)
                self._forget(child.process)
                child.process = None

    def kill_all(self) -> None:
        for child in reversed(self._children):
            if child.process is not None:
                kill_group(child.process.pid)
                child.process.wait()
                self._forget(child.process)
                child.process = None

    def close(self) -> None:
        """Lets the guardian go. A child that was missed, if any, is ended by it on its way out."""
        if self._guardian.stdin is not None:
            self._guardian.stdin.close()
        self._guardian.wait()
