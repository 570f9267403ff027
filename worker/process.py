"""A child process: started apart from us, listened to with caps, and gone with all that it started when it ends."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import IO, BinaryIO

from worker.protocol import AnyMessage, ReadyMessage, capped_lines, parse

LOG_FILE = "log.txt"
LOG_BYTES = 10 * 2**20
PIPE_SECONDS = 5.0

Hear = Callable[[AnyMessage], None]
Start = Callable[[], "subprocess.Popen[bytes]"]


class Child:
    """A process that leads its own session. It reads the workspaces of its tasks from stdin, one per line; the end of
    stdin tells it that we died, and so does the system. `directory` is its home and goes with it."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], directory: Path) -> None:
        self._directory = directory
        self._process = _spawn(
            lambda: subprocess.Popen(
                list(argv),
                cwd=directory,
                env=dict(env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                umask=0o077,
            )
        )
        self._alive = threading.Lock()  # held while a signal is sent: the process id is ours until it was reaped
        self._reaped = False
        self._changed = threading.Condition()
        self._hear: Hear | None = None
        self._log: _CappedLog | None = None
        self._ready: ReadyMessage | None = None
        self._returncode: int | None = None
        self.tasks = 0
        self._readers = [
            _start(self._read_messages, f"stdout-{self.pid}"),
            _start(self._read_log, f"stderr-{self.pid}"),
        ]
        _start(self._reap, f"reaper-{self.pid}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code (negative: a signal) once it ended."""
        return self._returncode

    @property
    def ready(self) -> ReadyMessage | None:
        """Its offer to do another task, if it lives and made one after the last."""
        return self._ready if self._returncode is None else None

    def assign(self, workspace: Path, hear: Hear) -> None:
        """Have it do the task in `workspace`. `hear` gets what it tells until it is ready again, or ended."""
        with self._changed:
            self.tasks += 1
            self._ready = None
            self._hear = hear
            self._log = _CappedLog(workspace / LOG_FILE)
        with suppress(OSError):  # it ended: `wait` tells
            stdin = _opened(self._process.stdin)
            stdin.write(f"{workspace}\n".encode())
            stdin.flush()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it became ready or ended within this time. Once ended, nothing that it started is left."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._returncode is not None or self._ready is not None, timeout=seconds
            )

    def terminate(self) -> None:
        """Ask it to stop after its step."""
        self._send(signal.SIGTERM)

    def drain(self) -> None:
        """Ask it to save what it did up to the end of its step, and to stop."""
        self._send(signal.SIGUSR1)

    def dump(self) -> None:
        """Have it write to its log where each of its threads is. One that does not know how ends."""
        self._send(signal.SIGUSR2)

    def kill(self) -> None:
        """SIGKILL for the child and everything it started. No-op once it ended."""
        with self._alive:
            if not self._reaped:
                self._kill_group()

    def end(self) -> None:
        """Kill it and wait until nothing is left, its home included."""
        self.kill()
        with self._changed:
            self._changed.wait_for(lambda: self._returncode is not None)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, number: signal.Signals) -> None:
        with self._alive:
            if not self._reaped:
                self._process.send_signal(number)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # empty; or, on macOS, nothing but a zombie
            os.killpg(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        returncode = self._process.wait()
        with self._alive:
            self._kill_group()
            self._reaped = True
        for reader in self._readers:
            reader.join(PIPE_SECONDS)
        with suppress(OSError):  # what was not yet written to it
            _opened(self._process.stdin).close()
        with self._changed:
            self._stop_listening()
            self._returncode = returncode
            self._changed.notify_all()

    # Readers close what they read: whoever left the child's session may hold its other end open for ever.
    def _read_messages(self) -> None:
        with _opened(self._process.stdout) as stream:
            for line in capped_lines(stream):
                message = parse(line)
                if isinstance(message, ReadyMessage):
                    with self._changed:
                        if self._hear is not None:
                            self._stop_listening()
                            self._ready = message
                            self._changed.notify_all()
                elif message is not None and (hear := self._hear) is not None:
                    hear(message)

    def _read_log(self) -> None:
        """Go on reading whatever comes, so that the child never blocks."""
        with _opened(self._process.stderr) as stream:
            while chunk := os.read(stream.fileno(), 2**16):
                if (log := self._log) is not None:
                    log.write(chunk)

    def _stop_listening(self) -> None:
        self._hear = None
        if self._log is not None:
            self._log.close()
            self._log = None


class _CappedLog:
    """The first LOG_BYTES of what a child writes about one task."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._room = LOG_BYTES

    def write(self, chunk: bytes) -> None:
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.write(chunk[: self._room])
            except OSError:  # a full disk must not block the child
                self._room = 0
            self._room = max(0, self._room - len(chunk))

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _spawn(start: Start) -> "subprocess.Popen[bytes]":
    """The process, started by a thread that ends with this process only.

    To Linux, the parent whose death ends a child (`worker.child`) is the thread that started it; slots end sooner."""
    answer: Future[subprocess.Popen[bytes]] = Future()
    _orders().put((start, answer))
    return answer.result()


@cache
def _orders() -> "SimpleQueue[tuple[Start, Future[subprocess.Popen[bytes]]]]":
    orders: SimpleQueue[tuple[Start, Future[subprocess.Popen[bytes]]]] = SimpleQueue()

    def serve() -> None:
        while True:
            start, answer = orders.get()
            try:
                answer.set_result(start())
            except Exception as error:
                answer.set_exception(error)

    _start(serve, "spawner")
    return orders


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the child was started without this pipe")
    return stream


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
