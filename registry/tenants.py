"""Tenants: whose things are whose."""

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from registry.models import Tenant


def default_tenant(session: Session) -> Tenant:
    """The tenant of a single-team installation, made on first use; two first uses at once make one."""
    session.execute(insert(Tenant).values(name="default").on_conflict_do_nothing(index_elements=[Tenant.name]))
    return session.scalars(select(Tenant).where(Tenant.name == "default")).one()
