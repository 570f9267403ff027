"""Any order of calls, by any owner past or present, against a model that fits on one page."""

import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Engine, select, update

from registry.db import SessionFactory, make_sessions, transaction
from registry.errors import CancelRequested, FenceLost, JobCancelling, JobTerminal
from registry.jobs.cancel import request_cancel
from registry.jobs.clock import NOW
from registry.jobs.fail import RETRIES, fail
from registry.jobs.lease import Beat, heartbeat, release
from registry.jobs.pause import request_pause, resume
from registry.jobs.reaper import tick
from registry.jobs.states import OWNED, TERMINAL
from registry.models import Adapter, Control, Job, JobAttempt, Version
from tests.conftest import empty_database
from tests.factories import make_job
from tests.registry.jobs.helpers import LEASE, claim_one, expire_lease, make_due, publish, queue_jobs

MAX_RUNNING, MAX_INFRA = 2, 1
PICK = st.integers(min_value=0, max_value=10**6)
CLASSES = st.sampled_from(["user", "diverged", "oom", "infra", "bug", "host_oom", "native_crash"])
QUEUES = st.sampled_from(["default", "gpu"])


@dataclass
class Expected:
    """What the model knows of one job."""

    state: str = "queued"
    fence: int = 0
    infra: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    paused: bool = False
    priority: int = 100
    queue: str = "default"
    version: int | None = None


class JobMachine(RuleBasedStateMachine):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.sessions: SessionFactory = make_sessions(engine)
        self.adapter: Adapter = queue_jobs(self.sessions, 0, max_running=MAX_RUNNING)
        self.jobs: dict[uuid.UUID, Expected] = {}
        self.owners: list[Job] = []  # every claim ever made, as its worker remembers it
        self.published = 0

    def teardown(self) -> None:
        empty_database(self.engine)

    def running(self) -> int:
        return sum(job.state in OWNED for job in self.jobs.values())

    def owner(self, pick: int) -> tuple[Job, Expected, bool]:
        job = self.owners[pick % len(self.owners)]
        expected = self.jobs[job.id]
        return job, expected, expected.fence == job.fence and expected.state in OWNED

    def attempt(self, call: Any, *, allowed: bool) -> Any:
        """The call's result; when it is not allowed, it must raise FenceLost."""
        try:
            result = call()
        except FenceLost:
            assert not allowed
            return None
        assert allowed
        return result

    @rule(priority=st.integers(min_value=0, max_value=3), queue=QUEUES)
    def submit(self, priority: int, queue: str) -> None:
        with transaction(self.sessions) as session:
            job = make_job(
                session, self.adapter, priority=priority, queue=queue, deadline_at=datetime.now(UTC) + timedelta(1)
            )
        self.jobs[job.id] = Expected(priority=priority, queue=queue)

    @rule(queue=QUEUES)
    def claim(self, queue: str) -> None:
        make_due(self.sessions)
        waiting = [j for j in self.jobs.values() if j.state == "queued" and not j.paused and j.queue == queue]
        job = claim_one(self.sessions, queues=[queue])
        assert (job is not None) == (bool(waiting) and self.running() < MAX_RUNNING)
        if job is not None:
            expected = self.jobs[job.id]
            assert expected in waiting and expected.priority == min(j.priority for j in waiting)
            assert expected.state == "queued" and (job.fence or 0) > max(j.fence for j in self.jobs.values())
            expected.state, expected.fence = "running", job.fence or 0
            self.owners.append(job)

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def beat(self, pick: int) -> None:
        job, expected, mine = self.owner(pick)

        def call() -> Beat:
            with transaction(self.sessions) as session:
                return heartbeat(session, job_id=job.id, fence=job.fence or 0, lease_seconds=LEASE, progress=None)

        cancel = expected.state == "cancelling"
        found = self.attempt(call, allowed=mine)
        assert found in (None, Beat(cancel=cancel, pause=expected.paused and not cancel))

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def publish(self, pick: int) -> None:
        job, expected, mine = self.owner(pick)
        replay = expected.state == "succeeded" and expected.fence == job.fence
        try:
            result = self.attempt(lambda: publish(self.sessions, job), allowed=mine or replay)
        except CancelRequested:
            assert mine and expected.state == "cancelling"
            return
        if result is None:
            return
        assert expected.state != "cancelling" and result.replayed == replay
        if not replay:
            self.published += 1
            expected.state, expected.version = "succeeded", self.published
        assert result.version == expected.version

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, error_class=CLASSES)
    def fail(self, pick: int, error_class: Any) -> None:
        job, expected, mine = self.owner(pick)

        def call() -> str:
            with transaction(self.sessions) as session:
                told = {"error_class": error_class, "code": "c", "message": "m", "max_infra_failures": MAX_INFRA}
                return fail(session, job_id=job.id, fence=job.fence or 0, **told)

        result = self.attempt(call, allowed=mine)
        if result is None:
            return
        if expected.state == "cancelling":
            expected.state = "cancelled"
        elif error_class == "infra":
            expected.infra += 1
            expected.state = "queued" if expected.infra <= MAX_INFRA else "failed"
        else:
            expected.failures[error_class] += 1
            again = expected.failures[error_class] <= RETRIES.get(error_class, 0)
            expected.state = "queued" if again else "failed"
        assert result == expected.state

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        job, expected, mine = self.owner(pick)

        def call() -> str:
            with transaction(self.sessions) as session:
                return release(session, job_id=job.id, fence=job.fence or 0)

        if self.attempt(call, allowed=mine):
            expected.state = "cancelled" if expected.state == "cancelling" else "queued"

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        expected = self.jobs[job_id]
        try:
            with transaction(self.sessions) as session:
                state = request_cancel(session, tenant_id=self.adapter.tenant_id, job_id=job_id).state
        except JobTerminal:
            assert expected.state in ("succeeded", "failed")
            return
        moves = {"queued": "cancelled", "running": "cancelling"}
        expected.state = moves.get(expected.state, expected.state)
        assert state == expected.state

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, pause=st.booleans())
    def pause_or_resume(self, pick: int, *, pause: bool) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        expected = self.jobs[job_id]
        try:
            with transaction(self.sessions) as session:
                (request_pause if pause else resume)(session, tenant_id=self.adapter.tenant_id, job_id=job_id)
        except JobTerminal:
            assert expected.state in TERMINAL
        except JobCancelling:
            assert expected.state == "cancelling"
        else:
            assert expected.state in ("queued", "running")
            expected.paused = pause

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def let_the_deadline_pass(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        if self.jobs[job_id].state != "queued":
            return
        with transaction(self.sessions) as session:
            late = update(Job).where(Job.id == job_id, Job.deadline_at.is_not(None))
            session.execute(late.values(deadline_at=NOW - timedelta(seconds=1)))
        paused = self.jobs[job_id].paused
        assert self.tick() == int(not paused)
        if not paused:
            self.jobs[job_id].state = "failed"

    def tick(self) -> int:
        with transaction(self.sessions) as session:
            session.execute(update(Control).values(reaper_tick=NOW, hold_until=None))
            return tick(session, lease_seconds=90, reaper_seconds=15, max_infra_failures=MAX_INFRA)

    @precondition(lambda self: self.running())
    @rule(pick=PICK)
    def lose_worker(self, pick: int) -> None:
        owned = [job_id for job_id, job in self.jobs.items() if job.state in OWNED]
        job_id = owned[pick % len(owned)]
        expire_lease(self.sessions, job_id)
        assert self.tick() == 1
        expected = self.jobs[job_id]
        if expected.state == "cancelling":
            expected.state = "cancelled"
        else:
            expected.infra += 1
            expected.state = "queued" if expected.infra <= MAX_INFRA else "failed"
        with self.sessions() as session:
            fence = session.get_one(Job, job_id).fence or 0
        assert fence > expected.fence
        expected.fence = fence

    @invariant()
    def database_and_model_agree(self) -> None:
        with self.sessions() as session:
            stored = {job.id: job for job in session.scalars(select(Job))}
            assert {i: j.state for i, j in stored.items()} == {i: e.state for i, e in self.jobs.items()}
            assert all((job.finished_at is not None) == (job.state in TERMINAL) for job in stored.values())
            attempts = session.scalars(select(JobAttempt)).all()
            assert {(a.job_id, a.attempt) for a in attempts if a.ending is None} == {
                (job.id, job.attempt) for job in stored.values() if job.state in OWNED
            }
            assert len(attempts) == sum(job.attempt for job in stored.values()) == len(self.owners)
            versions = {row.job_id: row.version for row in session.execute(select(Version.job_id, Version.version))}
            assert versions == {i: e.version for i, e in self.jobs.items() if e.version is not None}
            assert sorted(versions.values()) == list(range(1, self.published + 1))
            assert session.get_one(Adapter, self.adapter.id).next_version == self.published + 1


def test_any_order_of_calls_agrees_with_the_model(engine: Engine) -> None:
    run_state_machine_as_test(
        lambda: JobMachine(engine),
        settings=settings(
            max_examples=10, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
