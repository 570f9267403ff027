import uuid

import pytest
from sqlalchemy import func, select

from registry.db import SessionFactory, transaction
from registry.errors import JobNotFound
from registry.jobs.cancel import request_cancel
from registry.jobs.fail import fail
from registry.jobs.lease import Beat, heartbeat, release
from registry.jobs.pause import request_pause, resume
from registry.models import Job, Outbox
from tests.registry.jobs.helpers import LEASE, claim_one, claimed, make_due, open_shop, publish, reload


def pause(sessions: SessionFactory, job: Job) -> None:
    with transaction(sessions) as session:
        request_pause(session, tenant_id=job.tenant_id, job_id=job.id)


def unpause(sessions: SessionFactory, job: Job) -> None:
    with transaction(sessions) as session:
        resume(session, tenant_id=job.tenant_id, job_id=job.id)


def beat(sessions: SessionFactory, job: Job) -> Beat:
    with transaction(sessions) as session:
        return heartbeat(session, job_id=job.id, fence=job.fence or 0, lease_seconds=LEASE, progress=None)


def wakes(sessions: SessionFactory) -> int:
    with sessions() as session:
        return session.scalars(select(func.count()).select_from(Outbox)).one()


def test_a_paused_job_is_claimed_only_after_it_is_resumed(sessions: SessionFactory) -> None:
    job = open_shop(sessions).send().job
    pause(sessions, job)
    pause(sessions, job)
    assert claim_one(sessions) is None
    before = wakes(sessions)
    unpause(sessions, job)
    unpause(sessions, job)
    assert wakes(sessions) == before + 1
    taken = claim_one(sessions)
    assert taken is not None and taken.id == job.id


def test_a_running_job_is_told_by_its_heartbeat_and_waits_paused(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    assert not beat(sessions, job).pause
    pause(sessions, job)
    assert beat(sessions, job) == Beat(cancel=False, pause=True)
    before = wakes(sessions)
    with transaction(sessions) as session:
        assert release(session, job_id=job.id, fence=job.fence or 0) == "queued"
    assert wakes(sessions) == before  # nobody is called for a job that may not be claimed
    stored = reload(sessions, job.id)
    assert stored.paused_at is not None and stored.infra_failures == 0
    assert claim_one(sessions) is None
    unpause(sessions, job)
    assert claim_one(sessions) is not None


def test_a_pause_survives_a_failure_of_the_machinery(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    pause(sessions, job)
    with transaction(sessions) as session:
        told = {"error_class": "infra", "code": "c", "message": "m", "max_infra_failures": 3}
        fail(session, job_id=job.id, fence=job.fence or 0, **told)
    make_due(sessions)
    assert claim_one(sessions) is None


def test_a_job_that_ends_before_its_worker_hears_of_the_pause_has_ended(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    pause(sessions, job)
    assert publish(sessions, job).version == 1
    assert reload(sessions, job.id).state == "succeeded"


def test_cancel_outranks_pause(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    pause(sessions, job)
    with transaction(sessions) as session:
        request_cancel(session, tenant_id=job.tenant_id, job_id=job.id)
    assert beat(sessions, job) == Beat(cancel=True, pause=False)


def test_a_paused_job_has_no_deadline_and_a_resumed_one_a_new_one(sessions: SessionFactory) -> None:
    job = open_shop(sessions).send().job
    first = reload(sessions, job.id).deadline_at
    pause(sessions, job)
    assert reload(sessions, job.id).deadline_at is None
    unpause(sessions, job)
    again = reload(sessions, job.id).deadline_at
    assert first is not None and again is not None and again > first


@pytest.mark.parametrize("verb", [request_pause, resume])
def test_another_tenants_job_does_not_exist(sessions: SessionFactory, verb: object) -> None:
    job = claimed(sessions)
    with pytest.raises(JobNotFound), transaction(sessions) as session:
        verb(session, tenant_id=uuid.uuid4(), job_id=job.id)  # type: ignore[operator]  # one of two functions
