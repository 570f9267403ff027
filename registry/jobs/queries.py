"""Reading jobs. Another tenant's job answers exactly like one that does not exist."""

import uuid
from collections.abc import Mapping
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import JobNotFound
from registry.models import Job
from registry.paging import Page, page_by_age

Kind = Literal["train", "merge"]


def get_job(session: Session, *, tenant_id: uuid.UUID, job_id: uuid.UUID, kind: Kind = "train") -> Job:
    """This tenant's job of this kind; JobNotFound."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id, Job.kind == kind))
    if job is None:
        raise JobNotFound
    return job


def list_jobs(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    kind: Kind = "train",
    metadata: Mapping[str, str] | None = None,
    after: uuid.UUID | None = None,
    limit: int,
) -> Page[Job]:
    """This tenant's jobs, newest first; with `metadata`, those whose request carries all these pairs."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.kind == kind)
    if metadata:
        if any("\0" in text for pair in metadata.items() for text in pair):
            return Page([], has_more=False)  # Postgres cannot even store it
        query = query.where(Job.request.contains({"metadata": dict(metadata)}))
    return page_by_age(session, query, Job, after=after, limit=limit)
