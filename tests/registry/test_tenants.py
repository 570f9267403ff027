import uuid

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.models import Tenant
from registry.tenants import default_tenant
from tests.registry.race import race


def test_the_default_tenant_is_made_once(session: Session) -> None:
    assert default_tenant(session).id == default_tenant(session).id


def test_first_uses_at_once_get_the_same_tenant(sessions: SessionFactory) -> None:
    def first_use() -> uuid.UUID:
        with transaction(sessions) as session:
            return default_tenant(session).id

    assert len(set(race(*[first_use] * 8))) == 1
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Tenant)) == 1
