"""What any worker does beside its jobs: send wake-ups, collect dead leases and garbage. No leader: all of them may."""

import logging
import threading
import uuid
from collections.abc import Callable, Sequence

from registry.db import SessionFactory, transaction
from registry.errors import Unavailable
from registry.failpoints import hit
from registry.gc import collect
from registry.jobs import outbox, reaper
from registry.jobs.placement import note_worker
from registry.storage import ObjectStore
from registry.webhooks.deliveries import deliver_due
from worker.outages import Outage
from worker.warm import WarmPool

log = logging.getLogger(__name__)


class Chore:
    """A call repeated for ever in its own thread. It outlives every error, and no other chore waits for it. One that
    answers False had nothing to do, which does not say that an outage is over."""

    def __init__(self, name: str, call: Callable[[], object], *, seconds: float, longest_seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._outage = Outage(f"the {name}", first_seconds=seconds, longest_seconds=longest_seconds)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No call starts after this; one that hangs is left behind."""
        self._stopped.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            try:
                did = self._call()
            except Exception as error:
                pause = self._outage.failed(error)
            else:
                pause = self._seconds
                if did is not False:
                    self._outage.worked()


def make_relay(sessions: SessionFactory, send: Callable[[str, uuid.UUID], None], *, seconds: float) -> Chore:
    """Sends the wake-ups of the outbox. Redis may be away for as long as it likes."""

    def run() -> bool:
        errors: list[Exception] = []

        def remember(queue: str, job_id: uuid.UUID) -> None:
            try:
                send(queue, job_id)
            except Exception as error:
                errors.append(error)
                raise

        sent = outbox.relay(sessions, remember)  # which keeps the wake-up for later and goes on
        if errors:
            raise Unavailable(f"Redis takes no wake-ups; jobs start by polling. {errors[-1]}") from errors[-1]
        return sent > 0

    return Chore("relay", run, seconds=seconds, longest_seconds=60.0)


def make_presence(sessions: SessionFactory, *, name: str, queues: Sequence[str], slots: int, seconds: float) -> Chore:
    """Lets waiting jobs know that somebody serves their queue."""

    def note() -> None:
        with transaction(sessions) as session:
            note_worker(session, name=name, queues=queues, slots=slots)

    return Chore("presence", note, seconds=seconds, longest_seconds=seconds)


def make_evictor(warm: WarmPool, *, seconds: float) -> Chore:
    """Ends training processes that waited too long for another task."""
    return Chore("evictor", warm.evict, seconds=seconds, longest_seconds=seconds)


def make_messenger(sessions: SessionFactory, *, pepper: bytes, allow_lan: bool, seconds: float) -> Chore:
    """Sends what webhooks wait for."""

    def run() -> None:
        deliver_due(sessions, pepper=pepper, allow_lan=allow_lan)

    return Chore("messenger", run, seconds=seconds, longest_seconds=60.0)


def make_collector(
    sessions: SessionFactory, store: ObjectStore, *, seconds: float, grace_seconds: float, checkpoints_seconds: float
) -> Chore:
    """Deletes bytes that nobody refers to."""

    def run() -> None:
        done = collect(sessions, store, grace_seconds=grace_seconds, checkpoints_seconds=checkpoints_seconds)
        if done.condemned.objects or done.freed.objects:
            log.info("garbage: %s condemned, %s freed", done.condemned, done.freed)

    return Chore("collector", run, seconds=seconds, longest_seconds=seconds)


def make_reaper(sessions: SessionFactory, *, seconds: float, lease_seconds: float, max_infra_failures: int) -> Chore:
    """Gives the jobs of dead workers back to the queue."""

    def tick() -> None:
        with transaction(sessions) as session:
            reaper.tick(
                session,
                lease_seconds=lease_seconds,
                reaper_seconds=seconds,
                max_infra_failures=max_infra_failures,
            )
            hit("reaper.before_commit")

    # Not slower than usual: a reaper that comes late makes every reaper hold for a whole lease.
    return Chore("reaper", tick, seconds=seconds, longest_seconds=seconds)
