"""What an attempt has to tell, collected until the next heartbeat takes it along."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from registry.jobs.events import NewEvent
from worker.protocol import StepMessage

MAX_EVENTS = 1000
METRICS_EVERY_SECONDS = 1.0


class News:
    """Progress (the newest counts) and events (all are kept, up to MAX_EVENTS; metrics at most one per second).

    The first and the last step always become events: the one held back is added by `flush`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._progress: dict[str, Any] = {}
        self._changed = False
        # While Postgres is away, the oldest events give way: memory stays bounded for days.
        self._events: deque[NewEvent] = deque(maxlen=MAX_EVENTS)
        self._made = 0
        self._held: StepMessage | None = None
        self._last_metrics = -METRICS_EVERY_SECONDS

    def note(self, message: str, *, level: Literal["info", "warn"] = "info") -> None:
        with self._lock:
            self._add_held()
            self._add(NewEvent(type="message", level=level, message=message))

    def phase(self, phase: str, *, total_steps: int | None = None) -> None:
        with self._lock:
            self._progress["phase"] = phase
            if total_steps is not None:
                self._progress |= {"step": 0, "total_steps": total_steps}
            self._changed = True

    def step(self, step: StepMessage) -> None:
        """Remember one step; it becomes an event unless the last one is less than a second old."""
        with self._lock:
            self._progress |= _progress_of(step)
            self._changed = True
            if step.loss is None:
                return
            self._held = step
            now = self._clock()
            if now - self._last_metrics >= METRICS_EVERY_SECONDS or step.valid_loss is not None:
                self._last_metrics = now
                self._add_held()

    def checkpoint(self, step: int) -> None:
        """What was done up to this step is safe."""
        with self._lock:
            self._progress["checkpoint_step"] = step
            self._changed = True

    def flush(self) -> None:
        """Make an event of the last step, if it is none yet."""
        with self._lock:
            self._add_held()

    def take(self) -> tuple[dict[str, Any] | None, list[NewEvent], int]:
        """(progress or None when nothing changed, events) since the last `take`, and how many events there ever were:
        these are the last of them."""
        with self._lock:
            progress = dict(self._progress) if self._changed else None
            events = list(self._events)
            self._events.clear()
            self._changed = False
            return progress, events, self._made

    def give_back(self, events: list[NewEvent]) -> None:
        """Put events back that could not be delivered."""
        with self._lock:
            self._changed = True
            newer = list(self._events)
            self._events.clear()
            self._events.extend([*events, *newer])

    def _add_held(self) -> None:
        if self._held is not None:
            self._add(_metrics_event(self._held))
            self._held = None

    def _add(self, event: NewEvent) -> None:
        self._events.append(event)
        self._made += 1


def _progress_of(step: StepMessage) -> dict[str, Any]:
    wanted = {"step", "total_steps", "loss", "tokens_per_second", "eta_seconds"}
    return step.model_dump(include=wanted, exclude_none=True)


def _metrics_event(step: StepMessage) -> NewEvent:
    data = step.model_dump(
        include={"step", "learning_rate", "grad_norm", "tokens_per_second", "valid_loss"}, exclude_none=True
    )
    data |= {"train_loss": step.loss, "total_steps": step.total_steps}
    validation = "" if step.valid_loss is None else f", validation loss {step.valid_loss:.4f}"
    message = f"Loss {step.loss:.4f} at step {step.step} of {step.total_steps}{validation}"
    return NewEvent(type="metrics", level="info", message=message, data=data)
