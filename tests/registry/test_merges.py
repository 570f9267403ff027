import uuid

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from registry.adapters import alias_numbers, delete_version, set_alias
from registry.db import SessionFactory, transaction
from registry.errors import (
    AliasReserved,
    ArtifactNotFound,
    InvalidAliasName,
    MergeNotFound,
    MergeNotReady,
    QuotaExceeded,
    VersionInUse,
    VersionNotFound,
)
from registry.jobs.fail import fail
from registry.jobs.lease import claim
from registry.jobs.publish import publish_merge
from registry.jobs.spec import MergeOptions
from registry.jobs.submit import submit_merge
from registry.merges import find_stored, get_merge, get_merge_file, request_merge
from registry.models import Job, Merge, Version
from tests.factories import digest_of, make_adapter, make_blob, make_tenant, make_version
from tests.registry.race import race
from tests.registry.refs import assert_refs_match_rows


@pytest.fixture
def version(session: Session) -> Version:
    return make_version(session, make_adapter(session, make_tenant(session)))


def start(session: Session, merge: Merge) -> int:
    """A worker takes the merge's job; its fence."""
    job = claim(session, queues=["default"], worker="w", lease_seconds=60)
    assert job is not None
    assert job.id == merge.job_id
    assert job.fence is not None
    return job.fence


def finish(session: Session, merge: Merge) -> None:
    """A worker does the merge: one file, a digest and a report."""
    fence = start(session, merge)
    blob = make_blob(session, tenant_id=merge.tenant_id)
    files = {"model.safetensors": blob.id}
    publish_merge(session, job_id=merge.job_id, fence=fence, files=files, digest=digest_of("merged"), report={"n": 1})
    session.expire_all()


class TestRequest:
    def test_makes_a_job_that_names_the_version(self, session: Session, version: Version) -> None:
        merge, created = request_merge(session, version=version, options=MergeOptions())
        assert created
        assert (merge.tenant_id, merge.version_id, merge.dtype, merge.live) == (
            version.tenant_id,
            version.id,
            "base",
            True,
        )
        assert (merge.job.kind, merge.job.state, merge.job.tenant_id) == ("merge", "queued", version.tenant_id)
        assert merge.job.spec["version_id"] == str(version.id)
        assert merge.files == []

    def test_asking_again_gives_the_same_merge_in_every_state(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        assert request_merge(session, version=version, options=MergeOptions()) == (merge, False)
        finish(session, merge)
        again, created = request_merge(session, version=version, options=MergeOptions())
        assert (again.id, created) == (merge.id, False)
        assert [file.path for file in again.files] == ["model.safetensors"]

    def test_each_dtype_is_a_merge_of_its_own(self, session: Session, version: Version) -> None:
        ids = {
            request_merge(session, version=version, options=MergeOptions(dtype=dtype))[0].id
            for dtype in ("base", "float32", "bfloat16", "float16")
        }
        assert len(ids) == 4

    def test_each_combination_of_options_is_a_merge_of_its_own(self, session: Session, version: Version) -> None:
        options = [MergeOptions(scale=scale, shard_size=size) for scale in (1.0, 0.5) for size in (None, 2**20)]
        options += [MergeOptions(start="nf4"), MergeOptions(start="nf4", scale=0.5)]
        first = [request_merge(session, version=version, options=one) for one in options]
        again = [request_merge(session, version=version, options=one) for one in options]
        assert [created for _, created in first] == [True] * 6
        assert again == [(merge, False) for merge, _ in first]
        assert len({merge.id for merge, _ in first}) == 6
        chosen = [(merge.scale, merge.shard_size, merge.start) for merge, _ in first]
        assert chosen == [(one.scale, one.shard_size, one.start) for one in options]
        assert all(merge.job.spec["scale"] == merge.scale for merge, _ in first)

    def test_the_database_itself_keeps_a_request_from_being_two_merges(
        self, session: Session, version: Version
    ) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions(scale=0.5))
        job = submit_merge(session, version=version, options=MergeOptions(scale=0.5))
        session.add(Merge(tenant_id=merge.tenant_id, version_id=version.id, dtype="base", scale=0.5, job_id=job.id))
        with pytest.raises(IntegrityError, match="uq_merges_live"):
            session.flush()

    def test_a_stored_merge_of_other_options_is_not_taken_for_the_plain_one(
        self, session: Session, version: Version
    ) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions(scale=0.5))
        finish(session, merge)
        assert find_stored(session, version=version, options=MergeOptions()) is None
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        assert find_stored(session, version=version, options=MergeOptions()) is None
        finish(session, merge)
        assert find_stored(session, version=version, options=MergeOptions()) == merge

    def test_after_a_failure_asking_again_starts_another(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        fence = start(session, merge)
        fail(
            session,
            job_id=merge.job_id,
            fence=fence,
            error_class="user",
            code="bad",
            message="It cannot be merged.",
            max_infra_failures=0,
        )
        session.expire_all()
        another, created = request_merge(session, version=version, options=MergeOptions())
        assert created
        assert another.id != merge.id

    def test_requests_at_once_make_one_merge_and_one_job(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            version = make_version(session, make_adapter(session, make_tenant(session)))

        def ask() -> tuple[uuid.UUID, bool]:
            with transaction(sessions) as session:
                merge, created = request_merge(
                    session, version=session.get_one(Version, version.id), options=MergeOptions()
                )
                return merge.id, created

        results = race(*[ask] * 6)
        assert len({result[0] for result in results if isinstance(result, tuple)}) == 1
        assert sorted(result[1] for result in results if isinstance(result, tuple)) == [False] * 5 + [True]
        with sessions() as session:
            merge_jobs = select(func.count()).select_from(Job).where(Job.kind == "merge")
            assert session.scalar(merge_jobs) == session.scalar(select(func.count()).select_from(Merge)) == 1

    def test_a_deleted_version_is_not_merged(self, session: Session, version: Version) -> None:
        delete_version(session, version)
        with pytest.raises(VersionNotFound):
            request_merge(session, version=version, options=MergeOptions())

    def test_a_version_is_merged_or_deleted_but_never_both(self, sessions: SessionFactory) -> None:
        for _ in range(8):
            with transaction(sessions) as session:
                version = make_version(session, make_adapter(session, make_tenant(session)))

            def ask(version: Version = version) -> str:
                with transaction(sessions) as session:
                    request_merge(session, version=session.get_one(Version, version.id), options=MergeOptions())
                return "asked"

            def delete(version: Version = version) -> str:
                with transaction(sessions) as session:
                    delete_version(session, session.get_one(Version, version.id))
                return "deleted"

            asked, deleted = race(ask, delete)
            assert (asked == "asked") != (deleted == "deleted")
            assert isinstance(asked, VersionNotFound) or isinstance(deleted, VersionInUse)

    def test_a_refused_request_leaves_no_merge_without_a_job(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            version = make_version(session, make_adapter(session, make_tenant(session, max_queued=0)))
        with pytest.raises(QuotaExceeded), transaction(sessions) as session:
            request_merge(session, version=session.get_one(Version, version.id), options=MergeOptions())
        with sessions() as session:
            assert session.scalars(select(Merge)).all() == []


class TestAlias:
    def pointed_at(self, session: Session, version: Version) -> dict[str, int]:
        return alias_numbers(session, [version.adapter])[version.adapter_id]

    def test_points_at_the_version_from_the_publication_on(self, session: Session, version: Version) -> None:
        set_alias(session, version.adapter, name="prod", version=version.version)
        newer = make_version(session, version.adapter)
        merge, _ = request_merge(session, version=newer, options=MergeOptions(), alias="prod")
        assert self.pointed_at(session, newer) == {"prod": 1}
        finish(session, merge)
        assert self.pointed_at(session, newer) == {"prod": 2}

    def test_points_at_once_at_a_version_whose_merge_is_stored(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        finish(session, merge)
        assert request_merge(session, version=version, options=MergeOptions(), alias="prod") == (merge, False)
        assert self.pointed_at(session, version) == {"prod": 1}

    def test_every_alias_that_was_asked_for_while_it_ran_is_set(self, session: Session, version: Version) -> None:
        for alias in ("prod", "canary", "prod"):
            merge, _ = request_merge(session, version=version, options=MergeOptions(), alias=alias)
        assert merge.aliases == ["prod", "canary"]
        finish(session, merge)
        assert self.pointed_at(session, version) == {"prod": 1, "canary": 1}

    def test_a_merge_that_fails_moves_nothing(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions(), alias="prod")
        fence = start(session, merge)
        wrong = {"error_class": "user", "code": "merge_not_faithful", "message": "It is another model."}
        fail(session, job_id=merge.job_id, fence=fence, max_infra_failures=0, **wrong)  # type: ignore[arg-type]  # str
        assert self.pointed_at(session, version) == {}

    @pytest.mark.parametrize(
        ("alias", "error"), [("v7", AliasReserved), ("", InvalidAliasName), ("\0", InvalidAliasName)]
    )
    def test_a_name_that_cannot_be_one_leaves_no_merge(
        self, session: Session, version: Version, alias: str, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            request_merge(session, version=version, options=MergeOptions(), alias=alias)
        assert session.scalars(select(Merge)).all() == []

    def test_asked_for_while_it_is_published_it_is_set_by_one_of_the_two(self, sessions: SessionFactory) -> None:
        for _ in range(8):
            with transaction(sessions) as session:
                version = make_version(session, make_adapter(session, make_tenant(session)))
                merge, _ = request_merge(session, version=version, options=MergeOptions())
                fence = start(session, merge)
                blob = make_blob(session, tenant_id=merge.tenant_id)

            def ask(version: Version = version) -> None:
                with transaction(sessions) as session:
                    found = session.get_one(Version, version.id)
                    request_merge(session, version=found, options=MergeOptions(), alias="prod")

            def publish(merge: Merge = merge, fence: int = fence, blob: uuid.UUID = blob.id) -> None:
                with transaction(sessions) as session:
                    files = {"model.safetensors": blob}
                    publish_merge(session, job_id=merge.job_id, fence=fence, files=files, digest="0" * 64, report={})

            assert race(ask, publish) == [None, None]
            with transaction(sessions) as session:
                assert self.pointed_at(session, session.get_one(Version, version.id)) == {"prod": 1}


class TestGet:
    def test_another_tenants_merge_answers_like_none(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        stranger, messages = make_tenant(session), set()
        for merge_id in (merge.id, uuid.uuid4()):
            with pytest.raises(MergeNotFound) as caught:
                get_merge(session, tenant_id=stranger.id, merge_id=merge_id)
            messages.add((caught.value.message, caught.value.param, str(caught.value.details)))
        assert len(messages) == 1
        assert get_merge(session, tenant_id=version.tenant_id, merge_id=merge.id) is merge

    def test_a_merge_of_a_deleted_version_is_gone(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        finish(session, merge)
        delete_version(session, version)
        with pytest.raises(MergeNotFound):
            get_merge(session, tenant_id=version.tenant_id, merge_id=merge.id)
        assert_refs_match_rows(session)


class TestFile:
    def test_is_there_once_the_merge_has_ended(self, session: Session, version: Version) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        with pytest.raises(MergeNotReady):
            get_merge_file(session, merge, "model.safetensors")
        finish(session, merge)
        merge = get_merge(session, tenant_id=version.tenant_id, merge_id=merge.id)
        assert get_merge_file(session, merge, "model.safetensors").blob.refs == 1
        assert_refs_match_rows(session)

    @pytest.mark.parametrize("path", ["", "absent", "../model.safetensors", "a\0", "\ud800"])
    def test_anything_else_is_not_found(self, session: Session, version: Version, path: str) -> None:
        merge, _ = request_merge(session, version=version, options=MergeOptions())
        finish(session, merge)
        with pytest.raises(ArtifactNotFound):
            get_merge_file(session, merge, path)
