"""The heartbeat of one attempt: extends the lease, delivers the news, brings back cancel, pause and a lost fence."""

import logging
import random
import threading
import time
from collections.abc import Callable

from registry.db import SessionFactory, transaction
from registry.errors import FenceLost
from registry.jobs.lease import heartbeat
from worker.attempt import Attempt, Stop
from worker.outages import Outage

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0


class Heart:
    """Beats from its own thread and its own connection pool, so that no busy slot can make a worker look dead.

    While Postgres does not answer, the job goes on computing; `is_trusted` of the attempt then runs out."""

    def __init__(
        self, attempt: Attempt, sessions: SessionFactory, *, lease_seconds: float, heartbeat_seconds: float
    ) -> None:
        self._attempt = attempt
        self._sessions = sessions
        self._lease_seconds = lease_seconds
        self._every = heartbeat_seconds
        self._lock = threading.Lock()
        self._still = threading.Event()
        self._outage = Outage(f"the heartbeat of {attempt}", longest_seconds=min(RETRY_SECONDS, heartbeat_seconds))
        self._thread = threading.Thread(target=self._run, name=f"heart-{attempt.job_id.hex[:8]}", daemon=True)
        self.trust_from(time.monotonic())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No beat starts after this; one that is on its way is waited for."""
        self._still.set()
        self._thread.join()

    def trust_from(self, sent: float) -> None:
        # Counted from before the request: the lease began at the earliest then. One beat of margin.
        self._attempt.trust(sent + self._lease_seconds - self._every)

    def beat(self) -> None:
        """One beat now. FenceLost when the job is someone else's; an outage raises whatever the driver says."""
        with self._lock:
            if self._still.is_set():
                return
            progress, events, made = self._attempt.news.take()
            sent = time.monotonic()
            try:
                with transaction(self._sessions) as session:
                    found = heartbeat(
                        session,
                        job_id=self._attempt.job_id,
                        fence=self._attempt.fence,
                        lease_seconds=self._lease_seconds,
                        progress=progress,
                        events=events,
                        events_made=made,
                    )
            except BaseException:
                self._attempt.news.give_back(events)
                raise
        self.trust_from(sent)
        if found.cancel:
            self._attempt.stop(Stop.CANCEL)
        elif found.pause:
            self._attempt.stop(Stop.DRAIN)  # the job is left as if this worker shut down

    def conclude(self, write: Callable[[], None]) -> None:
        """Run the write that gives the job away. No beat runs meanwhile, and none after it succeeded."""
        with self._lock:
            write()
            self._still.set()

    def _run(self) -> None:
        pause = self._jittered()
        while not self._still.wait(pause):
            try:
                self.beat()
            except FenceLost:
                log.warning("%s: the lease is lost; stopping at once", self._attempt)
                self._attempt.stop(Stop.LOST)
                return
            except Exception as error:
                pause = self._outage.failed(error)
            else:
                self._outage.worked()
                pause = self._jittered()

    def _jittered(self) -> float:
        return self._every * random.uniform(0.85, 1.0)  # noqa: S311 - jitter, not a secret
