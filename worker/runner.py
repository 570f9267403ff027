"""The slots of one worker: threads that claim, run, and claim again. Postgres is asked; hints only save the wait."""

import logging
import random
import threading
import time
from collections.abc import Sequence

from registry.db import transaction
from registry.failpoints import hit
from registry.jobs.lease import claim
from registry.models import Job
from worker.attempt import Attempt, Stop
from worker.host import Host
from worker.outages import Outage
from worker.run_job import run_job

log = logging.getLogger(__name__)


class Runner:
    """`slots` jobs at a time from `queues`. An idle slot looks every `poll_seconds`, and at once after `wake`."""

    def __init__(self, host: Host, *, queues: Sequence[str], slots: int, poll_seconds: float) -> None:
        self._host = host
        self._queues = list(queues)
        self._poll_seconds = poll_seconds
        self._changed = threading.Condition()
        self._hints = 0
        self._draining = False
        self._attempts: set[Attempt] = set()
        self._threads = [
            threading.Thread(target=self._slot, name=f"slot-{number}", daemon=True) for number in range(slots)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There may be work."""
        with self._changed:
            self._hints += 1
            self._changed.notify_all()

    def is_whole(self) -> bool:
        """Whether all slots go on."""
        return all(thread.is_alive() for thread in self._threads)

    def drain(self) -> None:
        """Claim nothing more and give running jobs back. Returns at once; may be called from a signal handler."""
        # A signal handler may interrupt a thread that holds the lock, so another thread does the work.
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def join(self, seconds: float) -> bool:
        """Whether all slots have ended within this time, after `drain`."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _drain(self) -> None:
        with self._changed:
            self._draining = True
            attempts = list(self._attempts)
            self._changed.notify_all()
        for attempt in attempts:
            attempt.stop(Stop.DRAIN)

    def _slot(self) -> None:
        outage = Outage("asking Postgres for work", longest_seconds=max(30.0, self._poll_seconds))
        while not self._draining:
            seen = self._hints
            try:
                job = self._claim()
                outage.worked()
                if job is None:
                    self._idle(seen, self._poll_seconds * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
                else:
                    self._run(job)
            except Exception as error:
                self._idle(None, outage.failed(error))

    def _claim(self) -> Job | None:
        host = self._host
        with transaction(host.sessions) as session:
            job = claim(session, queues=self._queues, worker=host.name, lease_seconds=host.lease_seconds)
        if job is not None:
            hit("claim.after_commit")
        return job

    def _run(self, job: Job) -> None:
        if job.fence is None:
            raise RuntimeError(f"job {job.id} was claimed without a fence")
        attempt = Attempt(job_id=job.id, tenant_id=job.tenant_id, fence=job.fence)
        log.info("%s: claimed, attempt %d", attempt, job.attempt)
        with self._changed:
            self._attempts.add(attempt)
            draining = self._draining
        if draining:
            attempt.stop(Stop.DRAIN)
        try:
            run_job(self._host, attempt, job)
        finally:
            with self._changed:
                self._attempts.discard(attempt)

    def _idle(self, seen: int | None, seconds: float) -> None:
        """Wait; a hint that came after `seen` ends it, and so does drain."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._draining or (seen is not None and self._hints != seen), timeout=seconds
            )
