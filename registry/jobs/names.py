"""What the ids on a job row are called: one query for a whole page of jobs."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.models import Adapter, BaseModel, Job, Version


@dataclass(frozen=True, slots=True)
class JobNames:
    """A job's base model and adapter by name, the number of the version it published, if it did, and how many tokens
    the base model can read, if it says so."""

    base_model: str
    adapter: str
    version: int | None
    context_length: int | None

    @property
    def ref(self) -> str | None:
        """`name@7`, once there is one."""
        return None if self.version is None else f"{self.adapter}@{self.version}"


def job_names(session: Session, jobs: Sequence[Job]) -> dict[uuid.UUID, JobNames]:
    """The names of each of these jobs, by job id."""
    query = (
        select(Job.id, BaseModel.name, Adapter.name, Version.version, BaseModel.facts["context_length"].as_integer())
        .join(BaseModel, Job.base_model_id == BaseModel.id)
        .join(Adapter, Job.adapter_id == Adapter.id)
        .outerjoin(Version, Version.job_id == Job.id)
        .where(Job.id.in_([job.id for job in jobs]))
    )
    rows = session.execute(query)
    return {job_id: JobNames(*names) for job_id, *names in rows}
