"""The child's end of the protocol: what it says, and whether it was asked to stop."""

import os
import threading
import time
from typing import Literal

from worker.protocol import AliveMessage, Message, NoteMessage, Phase, PhaseMessage, StepMessage, write

ALIVE_SECONDS = 1.0


class Stopped(Exception):
    """The supervisor asked this process to stop."""


class Reporter:
    """Writes messages to the descriptor that was stdout. `in_steps` is true while stopping waits for a step's end."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "wb")
        self._stop = threading.Event()
        self.in_steps = False
        self.is_draining = False
        self._last_alive = -ALIVE_SECONDS

    def write(self, message: Message) -> None:
        try:
            write(self._stream, message)
        except BrokenPipeError:  # nobody listens any more
            os._exit(1)

    def phase(self, phase: Phase, *, total_steps: int | None = None) -> None:
        self.in_steps = phase in ("training", "merging")
        self.write(PhaseMessage(phase=phase, total_steps=total_steps))

    def note(self, message: str, *, level: Literal["info", "warn"] = "info") -> None:
        self.write(NoteMessage(message=message, level=level))

    def step(self, step: StepMessage) -> None:
        self.write(step)

    def alive(self) -> None:
        """Something is done that has no name; said once a second at most."""
        if (now := time.monotonic()) - self._last_alive >= ALIVE_SECONDS:
            self._last_alive = now
            self.write(AliveMessage())

    def stop(self, *, drain: bool = False) -> None:
        """There shall be no next step; with `drain`, what was done so far shall be kept."""
        self.is_draining |= drain
        self._stop.set()

    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        if self.is_stopped():
            raise Stopped
