import random
import uuid

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.orm import Session

from registry.adapters import (
    alias_numbers,
    ensure_adapter,
    find_adapter,
    get_adapter,
    latest_numbers,
    list_adapters,
    set_alias,
)
from registry.db import SessionFactory, transaction
from registry.errors import AdapterNotFound, BaseModelMismatch, InvalidCursor, InvalidName
from registry.models import Adapter, Tenant
from tests.factories import make_adapter, make_base_model, make_tenant, make_version
from tests.registry.race import race

NOT_NAMES = ["", "A", "-a", ".a", "_a", "a b", "a/b", "a@1", "é", "a\0", "a\n", "x" * 129, "\ud800", "a%"]


@pytest.fixture
def tenant(session: Session) -> Tenant:
    return make_tenant(session)


def names(session: Session, tenant: Tenant, search: str | None = None) -> list[str]:
    return [adapter.name for adapter in list_adapters(session, tenant_id=tenant.id, search=search, limit=100).items]


class TestEnsure:
    def test_makes_it_once(self, session: Session, tenant: Tenant) -> None:
        base = make_base_model(session)
        first = ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=base)
        again = ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=base)
        assert first is again
        assert (first.name, first.base_model, first.next_version) == ("support", base, 1)

    def test_another_base_is_refused_and_named(self, session: Session, tenant: Tenant) -> None:
        base, other = make_base_model(session), make_base_model(session)
        ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=base)
        with pytest.raises(BaseModelMismatch) as caught:
            ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=other)
        assert caught.value.details == {"base_model": base.name}

    @pytest.mark.parametrize("name", NOT_NAMES)
    def test_refuses_what_is_no_name(self, session: Session, tenant: Tenant, name: str) -> None:
        with pytest.raises(InvalidName):
            ensure_adapter(session, tenant_id=tenant.id, name=name, base_model=make_base_model(session))

    @pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "latest", "7", "x" * 128])
    def test_accepts_every_name_of_the_grammar(self, session: Session, tenant: Tenant, name: str) -> None:
        base = make_base_model(session)
        assert ensure_adapter(session, tenant_id=tenant.id, name=name, base_model=base).name == name

    def test_two_tenants_may_use_one_name(self, session: Session, tenant: Tenant) -> None:
        base, other = make_base_model(session), make_tenant(session)
        mine = ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=base)
        theirs = ensure_adapter(session, tenant_id=other.id, name="support", base_model=make_base_model(session))
        assert mine.id != theirs.id

    def test_makers_at_once_get_the_same_adapter(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            tenant, base = make_tenant(session), make_base_model(session)

        def make() -> uuid.UUID:
            with transaction(sessions) as session:
                return ensure_adapter(session, tenant_id=tenant.id, name="support", base_model=base).id

        assert len(set(race(*[make] * 8))) == 1
        with sessions() as session:
            assert session.scalar(select(func.count()).select_from(Adapter)) == 1

    def test_of_two_bases_at_once_one_is_refused(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            tenant, bases = make_tenant(session), [make_base_model(session) for _ in range(2)]

        def make(index: int) -> uuid.UUID:
            with transaction(sessions) as session:
                return ensure_adapter(session, tenant_id=tenant.id, name="a", base_model=bases[index]).id

        results = race(lambda: make(0), lambda: make(1))
        assert sorted(type(result) for result in results if isinstance(result, Exception)) == [BaseModelMismatch]


class TestLookup:
    def test_another_tenants_adapter_answers_like_none(self, session: Session, tenant: Tenant) -> None:
        theirs = make_adapter(session, make_tenant(session), name="theirs")
        messages = set()
        for name in ("theirs", "absent", *NOT_NAMES):
            with pytest.raises(AdapterNotFound) as caught:
                get_adapter(session, tenant_id=tenant.id, name=name)
            messages.add((caught.value.message, caught.value.param, str(caught.value.details)))
        assert len(messages) == 1
        assert find_adapter(session, tenant_id=theirs.tenant_id, name="theirs") is theirs


class TestList:
    def test_lists_by_name_and_only_ones_own(self, session: Session, tenant: Tenant) -> None:
        for name in ("b", "a", "c"):
            make_adapter(session, tenant, name=name)
        make_adapter(session, make_tenant(session), name="d")
        assert names(session, tenant) == ["a", "b", "c"]

    def test_search_is_a_substring_in_any_case(self, session: Session, tenant: Tenant) -> None:
        for name in ("support-bot", "sales-bot", "translate"):
            make_adapter(session, tenant, name=name)
        assert names(session, tenant, "BOT") == ["sales-bot", "support-bot"]
        assert names(session, tenant, "port-b") == ["support-bot"]
        assert names(session, tenant, "") == ["sales-bot", "support-bot", "translate"]

    def test_search_takes_wildcards_literally(self, session: Session, tenant: Tenant) -> None:
        for name in ("a_b", "axb", "a.b"):
            make_adapter(session, tenant, name=name)
        assert names(session, tenant, "a_b") == ["a_b"]
        assert names(session, tenant, "_") == ["a_b"]
        assert names(session, tenant, ".") == ["a.b"]

    @pytest.mark.parametrize("search", ["%", "a%b", "/", "\\", "\0", "\ud800", "a b", "'; DROP TABLE adapters; --"])
    def test_search_for_what_no_name_contains_finds_nothing(
        self, session: Session, tenant: Tenant, search: str
    ) -> None:
        make_adapter(session, tenant, name="axb")
        assert names(session, tenant, search) == []

    def test_a_walk_during_inserts_sees_every_old_row_exactly_once(self, session: Session, tenant: Tenant) -> None:
        rng, base = random.Random(3), make_base_model(session)
        old = sorted(make_adapter(session, tenant, base, name=f"{rng.randrange(10**6):06}").name for _ in range(20))
        seen: list[str] = []
        more = True
        while more:
            page = list_adapters(
                session, tenant_id=tenant.id, after=seen[-1] if seen else None, limit=rng.randint(1, 4)
            )
            seen += [adapter.name for adapter in page.items]
            more = page.has_more
            make_adapter(session, tenant, base, name=f"{rng.randrange(10**6):06}x")
        assert len(seen) == len(set(seen))
        assert [name for name in seen if not name.endswith("x")] == old

    @pytest.mark.parametrize("after", ["theirs", "absent", "A\0"])
    def test_a_cursor_from_elsewhere_is_refused(self, session: Session, tenant: Tenant, after: str) -> None:
        make_adapter(session, make_tenant(session), name="theirs")
        with pytest.raises(InvalidCursor):
            list_adapters(session, tenant_id=tenant.id, after=after, limit=10)


def test_a_page_of_adapters_needs_one_query_for_numbers_and_one_for_aliases(session: Session, tenant: Tenant) -> None:
    busy, empty = make_adapter(session, tenant), make_adapter(session, tenant)
    for _ in range(3):
        make_version(session, busy)
    set_alias(session, busy, name="stable", version=2)
    set_alias(session, busy, name="next", version=3)
    statements: list[str] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: statements.append(call[2]))
    assert latest_numbers(session, [busy, empty]) == {busy.id: 3}
    assert alias_numbers(session, [busy, empty]) == {busy.id: {"next": 3, "stable": 2}, empty.id: {}}
    assert len(statements) == 2
