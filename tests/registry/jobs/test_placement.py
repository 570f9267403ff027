"""Who is served next, and who has waited too long."""

from typing import Any

import pytest
from sqlalchemy import select, text, update

from registry.db import SessionFactory, transaction
from registry.errors import UnknownQueue
from registry.jobs.clock import NOW, in_seconds
from registry.jobs.lease import claim
from registry.jobs.placement import Placement, check_queue, note_worker
from registry.jobs.reaper import tick
from registry.models import Adapter, Control, Job, Worker
from tests.factories import make_adapter, make_job, make_tenant
from tests.registry.jobs.helpers import claim_one, open_shop, queue_jobs, reload


def ticks(sessions: SessionFactory) -> int:
    with transaction(sessions) as session:
        session.execute(update(Control).values(reaper_tick=NOW, hold_until=None))
        return tick(session, lease_seconds=90, reaper_seconds=15, max_infra_failures=3)


def queue_for(sessions: SessionFactory, adapter: Adapter, **values: Any) -> Job:
    with transaction(sessions) as session:
        return make_job(session, adapter, **values)


def test_tenants_take_turns_whoever_queued_first(sessions: SessionFactory) -> None:
    greedy, modest = queue_jobs(sessions, 6), queue_jobs(sessions, 2)
    served = [job.tenant_id for _ in range(6) if (job := claim_one(sessions))]
    assert served[:4] in ([greedy.tenant_id, modest.tenant_id] * 2, [modest.tenant_id, greedy.tenant_id] * 2)
    assert served[4:] == [greedy.tenant_id] * 2


def test_a_tenant_that_runs_more_comes_later_though_its_job_is_older(sessions: SessionFactory) -> None:
    busy, idle = queue_jobs(sessions, 3), queue_jobs(sessions, 1)
    with transaction(sessions) as session:
        make_job(session, busy, state="running")
    job = claim_one(sessions)
    assert job is not None and job.tenant_id == idle.tenant_id


def test_urgency_outranks_fairness(sessions: SessionFactory) -> None:
    busy = queue_jobs(sessions, 1, priority_floor=0)
    claim_one(sessions)
    queue_jobs(sessions, 1)
    urgent = queue_for(sessions, busy, priority=10)
    job = claim_one(sessions)
    assert job is not None and job.id == urgent.id


def test_who_calls_all_its_jobs_urgent_overtakes_nobody(sessions: SessionFactory) -> None:
    loud, modest = queue_jobs(sessions, 0), queue_jobs(sessions, 2)
    patient = queue_for(sessions, loud, priority=100)
    urgent = [queue_for(sessions, loud, priority=0) for _ in range(2)]
    served = [job for _ in range(5) if (job := claim_one(sessions))]
    assert sum(job.tenant_id == modest.tenant_id for job in served[:4]) == 2  # turns, as if it had said nothing
    own = [job.id for job in served if job.tenant_id == loud.tenant_id]
    assert own == [urgent[0].id, urgent[1].id, patient.id]  # among its own they come first


def test_who_can_wait_lets_others_pass(sessions: SessionFactory) -> None:
    humble, other = queue_jobs(sessions, 0), queue_jobs(sessions, 0)
    queue_for(sessions, humble, priority=150)
    later = queue_for(sessions, other)
    job = claim_one(sessions)
    assert job is not None and job.id == later.id


def test_a_worker_takes_from_every_queue_it_serves_and_from_no_other(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        adapter = make_adapter(session, make_tenant(session))
        make_job(session, adapter, queue="cpu")
        wanted = {make_job(session, adapter, queue=queue).id for queue in ("gpu", "gpu-large")}
    taken = {job.id for _ in range(3) if (job := claim_one(sessions, queues=["gpu", "gpu-large"]))}
    assert taken == wanted


def test_a_claim_reads_one_row_per_tenant_however_many_wait(sessions: SessionFactory) -> None:
    adapter = queue_jobs(sessions, 0)
    with transaction(sessions) as session:
        session.execute(
            text(
                """INSERT INTO jobs (tenant_id, kind, spec, request, adapter_id, base_model_id)
                   SELECT :tenant, 'train', '{}', '{}', :adapter, :base FROM generate_series(1, 3000)"""
            ),
            {"tenant": adapter.tenant_id, "adapter": adapter.id, "base": adapter.base_model_id},
        )
        session.execute(text("ANALYZE jobs"))
    with transaction(sessions) as session:
        assert claim(session, queues=["default"], worker="w", lease_seconds=60) is not None
        # Counters of the running transaction, so that nobody else's reads are in them.
        scans = session.execute(text("SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables")).all()
    assert sum(row.seq_tup_read + (row.idx_tup_fetch or 0) for row in scans if row.relname == "jobs") < 50


def test_a_job_that_nobody_started_in_time_fails_and_says_so(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    job = shop.send(placement=Placement(deadline_seconds=3600)).job
    assert ticks(sessions) == 0
    with transaction(sessions) as session:
        session.execute(update(Job).values(deadline_at=in_seconds(-1)))
    assert ticks(sessions) == 1
    stored = reload(sessions, job.id)
    assert (stored.state, stored.error_code) == ("failed", "deadline_exceeded")
    assert stored.error_message is not None and "3600 s" in stored.error_message


def test_a_deadline_is_no_limit_to_running(sessions: SessionFactory) -> None:
    open_shop(sessions).send()
    assert claim_one(sessions) is not None
    with transaction(sessions) as session:
        session.execute(update(Job).values(deadline_at=in_seconds(-1)))
    assert ticks(sessions) == 0


def test_a_job_is_placed_as_it_asks(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        note_worker(session, name="w", queues=["gpu"], slots=1)
    job = open_shop(sessions).send(placement=Placement(queue="gpu", priority=7, deadline_seconds=99)).job
    stored = reload(sessions, job.id)
    assert (stored.queue, stored.priority, stored.deadline_seconds) == ("gpu", 7, 99)


def test_a_queue_that_no_worker_serves_is_refused(sessions: SessionFactory) -> None:
    with pytest.raises(UnknownQueue, match="There is: default"):
        open_shop(sessions).send(placement=Placement(queue="gpu"))


def test_a_worker_that_was_not_seen_for_a_week_is_forgotten(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        note_worker(session, name="old", queues=["gpu"], slots=1)
        session.execute(update(Worker).values(seen_at=NOW - text("interval '8 days'")))
        check_queue(session, "gpu")
        note_worker(session, name="new", queues=["default"], slots=2)
        note_worker(session, name="new", queues=["default", "cpu"], slots=2)
        with pytest.raises(UnknownQueue):
            check_queue(session, "gpu")
        check_queue(session, "cpu")
        assert session.scalars(select(Worker.name)).all() == ["new"]
