import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.adapters import delete_alias, list_aliases, resolve_version, set_alias
from registry.db import SessionFactory, transaction
from registry.errors import AliasNotFound, AliasReserved, InvalidAliasName, VersionNotFound
from registry.models import Adapter, Alias
from tests.factories import make_adapter, make_tenant, make_version
from tests.registry.race import race


@pytest.fixture
def adapter(session: Session) -> Adapter:
    adapter = make_adapter(session, make_tenant(session))
    for _ in range(3):
        make_version(session, adapter)
    return adapter


def test_an_alias_moves(session: Session, adapter: Adapter) -> None:
    assert set_alias(session, adapter, name="prod", version=1).version.version == 1
    before = list_aliases(session, adapter)[0].updated_at
    moved = set_alias(session, adapter, name="prod", version=3)
    assert moved.version.version == 3
    assert moved.updated_at > before
    resolved = resolve_version(session, tenant_id=adapter.tenant_id, name=adapter.name, ref="prod")
    assert resolved.version == 3


def test_aliases_are_listed_by_name(session: Session, adapter: Adapter) -> None:
    for name in ("prod", "canary"):
        set_alias(session, adapter, name=name, version=2)
    set_alias(session, other := make_adapter_with_version(session), name="theirs", version=1)
    assert [alias.name for alias in list_aliases(session, adapter)] == ["canary", "prod"]
    assert [alias.name for alias in list_aliases(session, other)] == ["theirs"]


def make_adapter_with_version(session: Session) -> Adapter:
    adapter = make_adapter(session, make_tenant(session))
    make_version(session, adapter)
    return adapter


@pytest.mark.parametrize("name", ["latest", "1", "007", "v1", "v007", "0"])
def test_names_that_mean_versions_are_reserved(session: Session, adapter: Adapter, name: str) -> None:
    with pytest.raises(AliasReserved):
        set_alias(session, adapter, name=name, version=1)


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", ".a", "a b", "a/b", "a@b", "é", "a\0", "a\n", "x" * 65, "v1\n"])
def test_refuses_what_is_no_alias(session: Session, adapter: Adapter, name: str) -> None:
    with pytest.raises(InvalidAliasName):
        set_alias(session, adapter, name=name, version=1)


@pytest.mark.parametrize("name", ["a", "v", "v1a", "latest-1", "a.b_c-d", "x" * 64])
def test_accepts_every_name_of_the_grammar(session: Session, adapter: Adapter, name: str) -> None:
    assert set_alias(session, adapter, name=name, version=1).name == name


@pytest.mark.parametrize("version", [0, -1, 4, 10**12])
def test_a_version_that_does_not_exist_is_not_found(session: Session, adapter: Adapter, version: int) -> None:
    with pytest.raises(VersionNotFound):
        set_alias(session, adapter, name="prod", version=version)
    assert list_aliases(session, adapter) == []


def test_a_deleted_alias_is_gone(session: Session, adapter: Adapter) -> None:
    set_alias(session, adapter, name="prod", version=1)
    delete_alias(session, adapter, name="prod")
    assert list_aliases(session, adapter) == []
    with pytest.raises(AliasNotFound):
        delete_alias(session, adapter, name="prod")


@pytest.mark.parametrize("name", ["absent", "latest", "1", "a\0", "\ud800"])
def test_deleting_what_is_not_there_is_not_found(session: Session, adapter: Adapter, name: str) -> None:
    with pytest.raises(AliasNotFound):
        delete_alias(session, adapter, name=name)


def test_an_alias_of_another_adapter_cannot_be_deleted(session: Session, adapter: Adapter) -> None:
    other = make_adapter_with_version(session)
    set_alias(session, other, name="prod", version=1)
    with pytest.raises(AliasNotFound):
        delete_alias(session, adapter, name="prod")
    assert len(list_aliases(session, other)) == 1


def test_writers_at_once_leave_one_alias_and_readers_always_find_a_target(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        adapter = make_adapter(session, make_tenant(session))
        for _ in range(4):
            make_version(session, adapter)
        set_alias(session, adapter, name="prod", version=1)

    def move(version: int) -> int:
        with transaction(sessions) as session:
            return set_alias(
                session, session.get_one(Adapter, adapter.id), name="prod", version=version
            ).version.version

    def read() -> int:
        with sessions() as session:
            return resolve_version(session, tenant_id=adapter.tenant_id, name=adapter.name, ref="prod").version

    moves = [lambda version=version: move(version) for version in (1, 2, 3, 4)]
    results = race(*moves, *[read] * 4)
    assert results[:4] == [1, 2, 3, 4]
    assert set(results[4:]) <= {1, 2, 3, 4}
    with sessions() as session:
        assert len(session.scalars(select(Alias)).all()) == 1
