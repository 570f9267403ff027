"""The database itself refuses what no code may do."""

import itertools
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry.jobs.states import OWNED, TERMINAL, TRANSITIONS, JobState
from registry.models import Job, JobEvent, JobTransition
from tests.factories import make_adapter, make_job, make_tenant, make_version


def move(session: Session, job: Job, state: str) -> None:
    """A bare UPDATE that keeps every other rule, so that only the transition can be at fault."""
    lease = "clock_timestamp()" if state in OWNED else "NULL"
    end = "clock_timestamp()" if state in TERMINAL else "NULL"
    session.execute(
        text(
            f"UPDATE jobs SET state = :state, lease_expires_at = {lease}, finished_at = {end}, worker = 'w', "
            "fence = nextval('fence_seq') WHERE id = :id"
        ),
        {"state": state, "id": job.id},
    )


def new_job(session: Session, state: str) -> Job:
    return make_job(session, make_adapter(session, make_tenant(session)), state=state)


def test_code_and_database_hold_the_same_transitions(session: Session) -> None:
    rows = {(JobState(r.from_state), JobState(r.to_state)) for r in session.scalars(select(JobTransition))}
    assert rows == TRANSITIONS


@pytest.mark.parametrize(("old", "new"), [p for p in itertools.permutations(JobState, 2) if p not in TRANSITIONS])
def test_an_illegal_transition_is_refused(session: Session, old: JobState, new: JobState) -> None:
    job = new_job(session, old)
    with pytest.raises(IntegrityError, match="illegal job transition"):
        move(session, job, new)


@pytest.mark.parametrize(("old", "new"), sorted(TRANSITIONS))
def test_a_legal_transition_is_made_and_told(session: Session, old: JobState, new: JobState) -> None:
    job = new_job(session, old)
    move(session, job, new)
    event = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id)).one()
    assert (event.type, event.data and (event.data["from"], event.data["to"])) == ("state", (old, new))


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize(
    "change", ["progress = '{}'", "error_code = 'x'", "fence = nextval('fence_seq')", "worker = 'w'"]
)
def test_a_job_that_has_ended_is_immutable(session: Session, state: str, change: str) -> None:
    job = new_job(session, state)
    with pytest.raises(IntegrityError, match="has ended"):
        session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": job.id})


@pytest.mark.parametrize(
    "change",
    [
        "fence = fence - 1",
        "fence = NULL",
        "spec = '{\"r\": 2}'",
        "request = '{\"r\": 2}'",
        "kind = 'merge'",
        "tenant_id = gen_random_uuid()",
        "lease_expires_at = NULL",
        "worker = NULL",
        "finished_at = clock_timestamp()",
    ],
)
def test_no_update_breaks_an_owned_job(session: Session, change: str) -> None:
    job = new_job(session, "running")
    with pytest.raises(IntegrityError):
        session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": job.id})


def test_a_job_publishes_one_version_only(session: Session) -> None:
    adapter: Any = make_adapter(session, make_tenant(session))
    job = make_job(session, adapter, state="succeeded")
    make_version(session, adapter, job=job)
    with pytest.raises(IntegrityError, match="uq_versions_job_id"):
        make_version(session, adapter, job=job)
