import uuid

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from registry.errors import InvalidCursor, JobNotFound
from registry.ids import parse_id, public_id
from registry.jobs.events import NewEvent, add_events, list_events
from registry.jobs.queries import get_job, list_jobs
from registry.models import Adapter, Job
from tests.factories import make_adapter, make_job, make_tenant


@pytest.fixture
def adapter(session: Session) -> Adapter:
    return make_adapter(session, make_tenant(session))


def test_jobs_are_listed_newest_first_page_by_page(session: Session, adapter: Adapter) -> None:
    jobs = [make_job(session, adapter) for _ in range(5)]
    session.execute(update(Job).where(Job.id.in_([jobs[1].id, jobs[2].id])).values(created_at=text("'2026-01-01Z'")))
    seen: list[uuid.UUID] = []
    more, after = True, None
    while more:
        page = list_jobs(session, tenant_id=adapter.tenant_id, after=after, limit=2)
        more, after = page.has_more, page.items[-1].id
        seen += [job.id for job in page.items]
    twins = sorted([jobs[1].id, jobs[2].id], reverse=True)
    assert seen == [jobs[4].id, jobs[3].id, jobs[0].id, *twins]


def test_only_jobs_with_all_the_metadata_are_listed(session: Session, adapter: Adapter) -> None:
    first = make_job(session, adapter, request={"metadata": {"team": "a", "run": "1"}})
    make_job(session, adapter, request={"metadata": {"team": "a"}})
    make_job(session, adapter)
    page = list_jobs(session, tenant_id=adapter.tenant_id, metadata={"team": "a", "run": "1"}, limit=10)
    assert [job.id for job in page.items] == [first.id]
    assert list_jobs(session, tenant_id=adapter.tenant_id, metadata={"team": "a\0"}, limit=10).items == []


def test_merge_jobs_are_not_fine_tuning_jobs(session: Session, adapter: Adapter) -> None:
    merge = make_job(session, adapter, kind="merge")
    assert list_jobs(session, tenant_id=adapter.tenant_id, limit=10).items == []
    with pytest.raises(JobNotFound):
        get_job(session, tenant_id=adapter.tenant_id, job_id=merge.id)
    assert get_job(session, tenant_id=adapter.tenant_id, job_id=merge.id, kind="merge").id == merge.id


def test_another_tenants_job_answers_like_one_that_does_not_exist(session: Session, adapter: Adapter) -> None:
    job, stranger = make_job(session, adapter), make_tenant(session)
    for job_id in (job.id, uuid.uuid4()):
        with pytest.raises(JobNotFound):
            get_job(session, tenant_id=stranger.id, job_id=job_id)
        with pytest.raises(InvalidCursor):
            list_jobs(session, tenant_id=stranger.id, after=job_id, limit=10)
    assert list_jobs(session, tenant_id=stranger.id, limit=10).items == []


def test_events_are_listed_newest_first_page_by_page(session: Session, adapter: Adapter) -> None:
    job, other = make_job(session, adapter), make_job(session, adapter)
    add_events(session, job.id, None, [NewEvent("message", "info", f"event {n}") for n in range(5)])
    add_events(session, other.id, None, [NewEvent("message", "info", "not mine")])
    first = list_events(session, job_id=job.id, after=None, limit=3)
    assert ([e.message for e in first.items], first.has_more) == (["event 4", "event 3", "event 2"], True)
    rest = list_events(session, job_id=job.id, after=first.items[-1].id, limit=3)
    assert ([e.message for e in rest.items], rest.has_more) == (["event 1", "event 0"], False)
    with pytest.raises(InvalidCursor):
        list_events(session, job_id=other.id, after=first.items[-1].id, limit=3)


def test_public_ids_round_trip_and_nothing_else_parses() -> None:
    value = uuid.uuid4()
    assert public_id("ftjob", value) == f"ftjob-{value.hex}"
    assert parse_id("ftjob", public_id("ftjob", value)) == value
    wrong = [
        "",
        "ftjob-",
        value.hex,
        f"file-{value.hex}",
        f"ftjob-{value}",
        f"ftjob-{value.hex.upper()}x",
        f"ftjob-{value.hex}\n",
    ]
    assert [text for text in wrong if parse_id("ftjob", text) is not None] == []
