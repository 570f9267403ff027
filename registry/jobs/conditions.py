"""Conditions that partial indexes answer: written as literals, because a plan for any parameter cannot use them."""

from sqlalchemy import ColumnElement, bindparam, literal

from registry.jobs.states import OWNED, JobState
from registry.models import Job

IS_QUEUED: ColumnElement[bool] = Job.state == literal(JobState.QUEUED.value, literal_execute=True)
IS_OWNED: ColumnElement[bool] = Job.state.in_(
    bindparam("owned", sorted(state.value for state in OWNED), expanding=True, literal_execute=True)
)
