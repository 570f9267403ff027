import random
import uuid
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import BlobGone, FileInUse, FileNotFound, InvalidCursor, InvalidFilename
from registry.files import create_file, delete_file, find_file, get_file, list_files, pin_file
from registry.ids import public_id
from registry.models import File, Job, Tenant
from tests.factories import make_adapter, make_blob, make_file, make_job, make_tenant
from tests.registry.race import race
from tests.registry.refs import assert_refs_match_rows


@pytest.fixture
def tenant(session: Session) -> Tenant:
    return make_tenant(session)


def walk(session: Session, tenant: Tenant, limit: int, **options: Any) -> list[uuid.UUID]:
    """Every listed id, page by page."""
    seen: list[uuid.UUID] = []
    more = True
    while more:
        page = list_files(session, tenant_id=tenant.id, after=seen[-1] if seen else None, limit=limit, **options)
        seen += [file.id for file in page.items]
        more = page.has_more
    return seen


class TestCreate:
    def test_a_file_holds_a_reference_to_its_bytes(self, session: Session, tenant: Tenant) -> None:
        blob = make_blob(session, tenant_id=tenant.id)
        report = {"rows": 2}
        file = create_file(
            session, tenant_id=tenant.id, blob_id=blob.id, filename="a.jsonl", purpose="fine-tune", report=report
        )
        assert get_file(session, tenant_id=tenant.id, file_id=file.id) is file
        assert (file.filename, file.purpose, file.report, file.blob.id) == ("a.jsonl", "fine-tune", report, blob.id)
        assert_refs_match_rows(session)

    def test_bytes_that_are_not_stored_make_no_file(self, session: Session, tenant: Tenant) -> None:
        blob = make_blob(session, state="intent")
        with pytest.raises(BlobGone):
            create_file(session, tenant_id=tenant.id, blob_id=blob.id, filename="a", purpose="fine-tune", report=None)
        assert list_files(session, tenant_id=tenant.id, limit=10).items == []

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", "a\r\nb", "\ud800", "x" * 256])
    def test_refuses_names_that_something_would_act_on(self, session: Session, tenant: Tenant, name: str) -> None:
        blob = make_blob(session)
        with pytest.raises(InvalidFilename):
            create_file(session, tenant_id=tenant.id, blob_id=blob.id, filename=name, purpose="fine-tune", report=None)
        assert blob.refs == 0

    def test_accepts_names_in_any_script(self, session: Session, tenant: Tenant) -> None:
        blob = make_blob(session)
        file = create_file(
            session, tenant_id=tenant.id, blob_id=blob.id, filename="дані 😀.jsonl", purpose="fine-tune", report=None
        )
        assert file.filename == "дані 😀.jsonl"


class TestLookup:
    def test_another_tenants_file_answers_like_none(self, session: Session, tenant: Tenant) -> None:
        theirs = make_file(session, make_tenant(session))
        messages = set()
        for look in (get_file, delete_file):
            for file_id in (theirs.id, uuid.uuid4()):
                with pytest.raises(FileNotFound) as caught:
                    look(session, tenant_id=tenant.id, file_id=file_id)
                messages.add((caught.value.message, caught.value.param, str(caught.value.details)))
        assert len(messages) == 1
        assert find_file(session, tenant_id=tenant.id, file_id=theirs.id) is None
        assert pin_file(session, tenant_id=tenant.id, file_id=theirs.id, purpose="fine-tune") is None
        assert list_files(session, tenant_id=tenant.id, limit=10).items == []
        assert find_file(session, tenant_id=theirs.tenant_id, file_id=theirs.id) is theirs

    def test_a_file_of_another_purpose_is_not_found(self, session: Session, tenant: Tenant) -> None:
        file = make_file(session, tenant, purpose="base-model")
        assert find_file(session, tenant_id=tenant.id, file_id=file.id, purpose="fine-tune") is None
        assert pin_file(session, tenant_id=tenant.id, file_id=file.id, purpose="fine-tune") is None
        assert find_file(session, tenant_id=tenant.id, file_id=file.id, purpose="base-model") is file


class TestList:
    def test_newest_first_or_oldest_first(self, session: Session, tenant: Tenant) -> None:
        ids = [make_file(session, tenant).id for _ in range(5)]
        assert walk(session, tenant, 2) == ids[::-1]
        assert walk(session, tenant, 2, order="asc") == ids

    def test_files_of_one_moment_are_each_listed_once(self, session: Session, tenant: Tenant) -> None:
        first = make_file(session, tenant)
        twins = [make_file(session, tenant, created_at=first.created_at).id for _ in range(6)]
        assert sorted(walk(session, tenant, 3)) == sorted([first.id, *twins])

    def test_keeps_to_the_purpose(self, session: Session, tenant: Tenant) -> None:
        make_file(session, tenant)
        base = make_file(session, tenant, purpose="base-model")
        assert walk(session, tenant, 10, purpose="base-model") == [base.id]

    def test_a_walk_during_inserts_sees_every_old_row_exactly_once(self, session: Session, tenant: Tenant) -> None:
        rng = random.Random(7)
        old = [make_file(session, tenant).id for _ in range(20)]
        seen: list[uuid.UUID] = []
        more = True
        while more:
            page = list_files(session, tenant_id=tenant.id, after=seen[-1] if seen else None, limit=rng.randint(1, 4))
            seen += [file.id for file in page.items]
            more = page.has_more
            for _ in range(rng.randint(0, 3)):
                make_file(session, tenant)
        assert seen == old[::-1]

    def test_a_client_may_delete_each_page_before_it_asks_for_the_next(self, session: Session, tenant: Tenant) -> None:
        ids = [make_file(session, tenant).id for _ in range(7)]
        seen: list[uuid.UUID] = []
        while True:
            page = list_files(session, tenant_id=tenant.id, after=seen[-1] if seen else None, limit=3)
            for file in page.items:
                delete_file(session, tenant_id=tenant.id, file_id=file.id)
            seen += [file.id for file in page.items]
            if not page.has_more:
                break
        assert seen == ids[::-1]
        assert_refs_match_rows(session)

    def test_a_cursor_of_another_tenant_is_refused(self, session: Session, tenant: Tenant) -> None:
        theirs = make_file(session, make_tenant(session))
        for after in (theirs.id, uuid.uuid4()):
            with pytest.raises(InvalidCursor):
                list_files(session, tenant_id=tenant.id, after=after, limit=10)


class TestDelete:
    def test_a_deleted_file_is_gone_and_its_bytes_are_free(self, session: Session, tenant: Tenant) -> None:
        file = make_file(session, tenant)
        delete_file(session, tenant_id=tenant.id, file_id=file.id)
        assert file.blob.refs == 0
        assert list_files(session, tenant_id=tenant.id, limit=10).items == []
        with pytest.raises(FileNotFound):
            delete_file(session, tenant_id=tenant.id, file_id=file.id)
        assert_refs_match_rows(session)

    @pytest.mark.parametrize("use", ["training_file_id", "validation_file_id"])
    @pytest.mark.parametrize("state", ["queued", "running", "cancelling"])
    def test_a_file_of_an_unfinished_job_stays(self, session: Session, tenant: Tenant, state: str, use: str) -> None:
        file = make_file(session, tenant)
        job = make_job(session, make_adapter(session, tenant), state=state, **{use: file.id})
        with pytest.raises(FileInUse) as caught:
            delete_file(session, tenant_id=tenant.id, file_id=file.id)
        assert caught.value.details == {"job": public_id("ftjob", job.id)}
        assert find_file(session, tenant_id=tenant.id, file_id=file.id) is file
        assert_refs_match_rows(session)

    @pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
    def test_a_file_of_an_ended_job_can_go(self, session: Session, tenant: Tenant, state: str) -> None:
        file = make_file(session, tenant)
        make_job(session, make_adapter(session, tenant), state=state, training_file_id=file.id)
        delete_file(session, tenant_id=tenant.id, file_id=file.id)
        assert_refs_match_rows(session)

    def test_two_deletes_drop_one_reference(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            file = make_file(session, make_tenant(session))

        def delete() -> None:
            with transaction(sessions) as session:
                delete_file(session, tenant_id=file.tenant_id, file_id=file.id)

        results = race(*[delete] * 4)
        assert results.count(None) == 1
        assert sum(isinstance(result, FileNotFound) for result in results) == 3
        with sessions() as session:
            assert_refs_match_rows(session)

    def test_a_job_and_a_delete_at_once_never_leave_a_job_without_its_file(self, sessions: SessionFactory) -> None:
        for _ in range(10):
            with transaction(sessions) as session:
                tenant = make_tenant(session)
                file, adapter = make_file(session, tenant), make_adapter(session, tenant)

            def submit(file: File = file, adapter: Any = adapter) -> bool:
                with transaction(sessions) as session:
                    pinned = pin_file(session, tenant_id=file.tenant_id, file_id=file.id, purpose="fine-tune")
                    if pinned is not None:
                        make_job(session, adapter, training_file_id=pinned.id)
                    return pinned is not None

            def delete(file: File = file) -> bool:
                with transaction(sessions) as session:
                    delete_file(session, tenant_id=file.tenant_id, file_id=file.id)
                return True

            submitted, deleted = race(submit, delete)
            assert isinstance(deleted, FileInUse) if submitted else deleted is True
            with sessions() as session:
                used = select(Job.id).join(File, Job.training_file_id == File.id).where(File.deleted_at.is_not(None))
                assert session.scalars(used).all() == []
