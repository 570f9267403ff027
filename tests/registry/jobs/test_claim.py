import functools
import uuid
from typing import Any

from sqlalchemy import Engine, event, func, select, text

from registry.db import SessionFactory, transaction
from registry.jobs.lease import claim
from registry.jobs.states import OWNED
from registry.models import Job
from tests.factories import make_adapter, make_job, make_tenant
from tests.registry.jobs.helpers import claim_one, claimed, make_due, queue_jobs, race, reload


def test_second_claim_loses(sessions: SessionFactory) -> None:
    queue_jobs(sessions)
    first, second = race(lambda: claim_one(sessions, "a"), lambda: claim_one(sessions, "b"))
    assert sorted([first is None, second is None]) == [False, True]


def test_claim_gives_a_lease_a_fence_and_an_attempt(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    stored = reload(sessions, job.id)
    assert (stored.state, stored.worker, stored.attempt) == ("running", "worker-1", 1)
    assert stored.fence is not None and stored.lease_expires_at is not None and stored.started_at is not None
    assert (job.state, job.fence, job.attempt) == ("running", stored.fence, 1)


def test_every_job_is_claimed_exactly_once(sessions: SessionFactory) -> None:
    threads, jobs = 6, 60
    for _ in range(3):  # three tenants, so that workers meet at more than one lock
        queue_jobs(sessions, jobs // 3)

    def drain(worker: str) -> list[uuid.UUID]:
        mine = []
        while job := claim_one(sessions, worker):
            mine.append(job.id)
        return mine

    results = race(*(functools.partial(drain, f"w{n}") for n in range(threads)))
    taken = [job_id for mine in results if isinstance(mine, list) for job_id in mine]
    assert len(taken) == jobs and len(set(taken)) == jobs
    with sessions() as session:
        assert set(session.scalars(select(Job.attempt))) == {1}
        assert len(set(session.scalars(select(Job.fence)))) == jobs


def test_max_running_is_never_exceeded(sessions: SessionFactory) -> None:
    limit = 3
    adapter = queue_jobs(sessions, 30, max_running=limit)
    counts: list[int] = []

    def work(worker: str) -> int:
        done = 0
        for _ in range(8):
            job = claim_one(sessions, worker)
            if job is None:
                continue
            with transaction(sessions) as session:
                owned = select(func.count()).where(Job.tenant_id == adapter.tenant_id, Job.state.in_(OWNED))
                counts.append(session.scalars(owned).one())
                session.get_one(Job, job.id).state = "queued"
                session.get_one(Job, job.id).lease_expires_at = None
            done += 1
        return done

    results = race(*(functools.partial(work, f"w{n}") for n in range(8)))
    assert sum(r for r in results if isinstance(r, int)) > limit
    assert not [r for r in results if isinstance(r, Exception)]
    assert max(counts) <= limit


def test_a_crowd_fills_max_running_exactly(sessions: SessionFactory) -> None:
    queue_jobs(sessions, 20, max_running=5)
    jobs = race(*(functools.partial(claim_one, sessions, f"w{n}") for n in range(12)))
    assert sum(isinstance(job, Job) for job in jobs) == 5


def test_a_tenant_at_its_limit_does_not_block_another(sessions: SessionFactory) -> None:
    queue_jobs(sessions, 60, max_running=0)
    other = queue_jobs(sessions, 1)
    job = claim_one(sessions)
    assert job is not None and job.tenant_id == other.tenant_id


def test_a_tenant_whose_lock_is_held_does_not_delay_another(sessions: SessionFactory) -> None:
    busy, free = queue_jobs(sessions, 1), queue_jobs(sessions, 1)
    with transaction(sessions) as holder:
        holder.execute(text("SELECT 1 FROM tenants WHERE id = :id FOR UPDATE"), {"id": busy.tenant_id})
        job = claim_one(sessions)
        assert job is not None and job.tenant_id == free.tenant_id


def test_tenants_whose_locks_are_held_cost_one_look_together(sessions: SessionFactory, engine: Engine) -> None:
    busy = [queue_jobs(sessions, 1).tenant_id for _ in range(5)]
    free = queue_jobs(sessions, 1).tenant_id
    looks: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "FROM tenants JOIN" in statement:
            looks.append(statement)

    with transaction(sessions) as holder:
        holder.execute(text("SELECT 1 FROM tenants WHERE id = ANY(:ids) FOR UPDATE"), {"ids": busy})
        event.listen(engine, "before_cursor_execute", note)
        try:
            job = claim_one(sessions)
        finally:
            event.remove(engine, "before_cursor_execute", note)
        assert job is not None and job.tenant_id == free
    assert len(looks) == 1


def test_a_claim_that_finds_nothing_keeps_no_lock(sessions: SessionFactory) -> None:
    adapter = queue_jobs(sessions, 1, max_running=0)
    with transaction(sessions) as session:
        assert claim(session, queues=["default"], worker="w", lease_seconds=60) is None
        with transaction(sessions) as other:
            lock = text("SELECT 1 FROM tenants WHERE id = :id FOR UPDATE NOWAIT")
            assert other.execute(lock, {"id": adapter.tenant_id}).scalar() == 1


def test_a_job_locked_by_a_cancel_is_passed_over(sessions: SessionFactory) -> None:
    adapter = queue_jobs(sessions, 2)
    with transaction(sessions) as holder:
        held = holder.scalars(
            select(Job).order_by(Job.priority, Job.run_after, Job.id).limit(1).with_for_update()
        ).one()
        job = claim_one(sessions)
        assert job is not None and job.id != held.id and job.tenant_id == adapter.tenant_id


def test_claim_takes_the_most_urgent_due_job_of_its_queues(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        adapter = make_adapter(session, make_tenant(session))
        make_job(session, adapter)
        urgent = make_job(session, adapter, priority=1)
        later = make_job(session, adapter, priority=0, run_after=func.clock_timestamp() + text("interval '1 hour'"))
        elsewhere = make_job(session, adapter, priority=0, queue="gpu")
    first = claim_one(sessions)
    assert first is not None and first.id == urgent.id
    both = claim_one(sessions, queues=["default", "gpu"])
    assert both is not None and both.id == elsewhere.id
    make_due(sessions)
    last = claim_one(sessions)
    assert last is not None and last.id == later.id


def test_claim_clears_what_the_last_attempt_left(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        adapter = make_adapter(session, make_tenant(session))
        left = {"error_class": "infra", "error_code": "worker_lost", "error_message": "gone", "progress": {"step": 3}}
        make_job(session, adapter, **left)
    job = claim_one(sessions)
    assert job is not None
    assert (job.error_class, job.error_code, job.error_message, job.progress) == (None, None, None, None)
