import random
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.adapters import (
    delete_alias,
    delete_version,
    get_version_file,
    latest_numbers,
    latest_version,
    list_versions,
    resolve_version,
    set_alias,
)
from registry.db import SessionFactory, transaction
from registry.errors import AdapterNotFound, ArtifactNotFound, InvalidCursor, VersionInUse, VersionNotFound
from registry.ids import public_id
from registry.models import Adapter, Merge, MergeFile, Tenant, Version, VersionFile
from tests.factories import digest_of, make_adapter, make_blob, make_job, make_tenant, make_version
from tests.registry.race import race
from tests.registry.refs import assert_refs_match_rows


@pytest.fixture
def tenant(session: Session) -> Tenant:
    return make_tenant(session)


@pytest.fixture
def adapter(session: Session, tenant: Tenant) -> Adapter:
    return make_adapter(session, tenant, name="bot")


def make_merge(session: Session, version: Version, *, state: str = "succeeded", dtype: str = "base") -> Merge:
    """A merge whose job is in `state`, with one file when it succeeded."""
    job = make_job(session, version.adapter, kind="merge", state=state)
    done = state == "succeeded"
    merge = Merge(
        tenant_id=version.tenant_id,
        version_id=version.id,
        dtype=dtype,
        job_id=job.id,
        live=state not in ("failed", "cancelled"),
        digest=digest_of("merge") if done else None,
    )
    session.add(merge)
    session.flush()
    if done:
        blob = make_blob(session, tenant_id=version.tenant_id, refs=1)
        session.add(MergeFile(merge_id=merge.id, path="model.safetensors", blob_id=blob.id))
        session.flush()
    return merge


class TestResolve:
    def test_every_way_to_name_a_version(self, session: Session, tenant: Tenant, adapter: Adapter) -> None:
        one, two, three = (make_version(session, adapter) for _ in range(3))
        set_alias(session, adapter, name="prod", version=2)
        found = {
            ref: resolve_version(session, tenant_id=tenant.id, name="bot", ref=ref)
            for ref in ("1", "v1", "2", "prod", "latest", "v3")
        }
        assert found == {"1": one, "v1": one, "2": two, "prod": two, "latest": three, "v3": three}

    @pytest.mark.parametrize(
        "ref",
        ["0", "v0", "2", "-1", "01", "v01", "999999999", "9" * 40, "V1", "vv1", "", "v", "absent", "latest ", "1\n"],
    )
    def test_a_number_never_given_or_another_spelling_is_not_found(
        self, session: Session, tenant: Tenant, adapter: Adapter, ref: str
    ) -> None:
        make_version(session, adapter)
        with pytest.raises(VersionNotFound):
            resolve_version(session, tenant_id=tenant.id, name="bot", ref=ref)

    @pytest.mark.parametrize("ref", ["Latest", "²", "١", "1.0", "a\0", "\ud800", "prod@1", "../1", "%"])
    def test_text_that_is_no_ref_is_not_found(
        self, session: Session, tenant: Tenant, adapter: Adapter, ref: str
    ) -> None:
        make_version(session, adapter)
        with pytest.raises(VersionNotFound):
            resolve_version(session, tenant_id=tenant.id, name="bot", ref=ref)

    def test_another_tenants_adapter_answers_like_none(
        self, session: Session, tenant: Tenant, adapter: Adapter
    ) -> None:
        make_version(session, adapter)
        stranger = make_tenant(session)
        for name in ("bot", "absent"):
            for ref in ("1", "latest"):
                with pytest.raises(AdapterNotFound):
                    resolve_version(session, tenant_id=stranger.id, name=name, ref=ref)

    def test_an_alias_of_another_adapter_is_not_found(self, session: Session, tenant: Tenant, adapter: Adapter) -> None:
        make_version(session, adapter)
        make_version(session, make_adapter(session, tenant, name="other"))
        set_alias(session, adapter, name="prod", version=1)
        with pytest.raises(VersionNotFound):
            resolve_version(session, tenant_id=tenant.id, name="other", ref="prod")

    def test_one_alias_name_in_two_adapters_names_each_ones_own(
        self, session: Session, tenant: Tenant, adapter: Adapter
    ) -> None:
        other = make_adapter(session, tenant, name="other")
        for owner in (adapter, other):
            version = make_version(session, owner)
            set_alias(session, owner, name="prod", version=1)
            assert resolve_version(session, tenant_id=tenant.id, name=owner.name, ref="prod") is version

    def test_files_come_with_the_version(self, session: Session, tenant: Tenant, adapter: Adapter) -> None:
        make_version(session, adapter)
        session.expunge_all()
        version = resolve_version(session, tenant_id=tenant.id, name="bot", ref="1")
        assert [(file.path, file.blob.size) for file in version.files] == [
            ("adapter_config.json", 3),
            ("adapter_model.safetensors", 3),
        ]


class TestLatest:
    def test_an_adapter_without_versions_has_none(self, session: Session, tenant: Tenant, adapter: Adapter) -> None:
        assert latest_version(session, adapter) is None
        with pytest.raises(VersionNotFound):
            resolve_version(session, tenant_id=tenant.id, name="bot", ref="latest")

    def test_is_the_highest_that_is_not_deleted(self, session: Session, adapter: Adapter) -> None:
        versions = [make_version(session, adapter) for _ in range(3)]
        delete_version(session, versions[2])
        assert latest_version(session, adapter) is versions[1]
        assert latest_numbers(session, [adapter]) == {adapter.id: 2}


class TestList:
    def test_newest_first_in_pages_without_the_deleted(self, session: Session, adapter: Adapter) -> None:
        versions = [make_version(session, adapter) for _ in range(6)]
        delete_version(session, versions[2])
        make_version(session, make_adapter(session, make_tenant(session)))
        first = list_versions(session, adapter, limit=3)
        rest = list_versions(session, adapter, after=first.items[-1].version, limit=3)
        assert [version.version for version in first.items + rest.items] == [6, 5, 4, 2, 1]
        assert (first.has_more, rest.has_more) == (True, False)

    def test_a_walk_during_publications_sees_every_old_version_once(self, session: Session, adapter: Adapter) -> None:
        rng = random.Random(5)
        old = [make_version(session, adapter).version for _ in range(12)]
        seen: list[int] = []
        more = True
        while more:
            page = list_versions(session, adapter, after=seen[-1] if seen else None, limit=rng.randint(1, 4))
            seen += [version.version for version in page.items]
            more = page.has_more
            make_version(session, adapter)
        assert seen == old[::-1]

    def test_goes_on_behind_a_deleted_version(self, session: Session, adapter: Adapter) -> None:
        versions = [make_version(session, adapter) for _ in range(3)]
        delete_version(session, versions[1])
        assert list_versions(session, adapter, after=2, limit=5).items == [versions[0]]

    @pytest.mark.parametrize("after", [0, -1, 2, 10**12])
    def test_a_number_that_was_never_given_is_no_cursor(self, session: Session, adapter: Adapter, after: int) -> None:
        make_version(session, adapter)
        with pytest.raises(InvalidCursor):
            list_versions(session, adapter, after=after, limit=5)


class TestFile:
    def test_finds_by_path(self, session: Session, adapter: Adapter) -> None:
        version = make_version(session, adapter)
        assert get_version_file(session, version, "adapter_config.json").path == "adapter_config.json"

    @pytest.mark.parametrize("path", ["", "absent", "../adapter_config.json", "a\0", "\ud800", "ADAPTER_CONFIG.JSON"])
    def test_anything_else_is_not_found(self, session: Session, adapter: Adapter, path: str) -> None:
        with pytest.raises(ArtifactNotFound):
            get_version_file(session, make_version(session, adapter), path)


class TestDelete:
    def test_the_version_is_gone_its_bytes_are_free_its_number_is_burned(
        self, session: Session, tenant: Tenant, adapter: Adapter
    ) -> None:
        version = make_version(session, adapter)
        blobs = list(session.scalars(select(VersionFile).where(VersionFile.version_id == version.id)))
        delete_version(session, version)
        for ref in ("1", "latest"):
            with pytest.raises(VersionNotFound):
                resolve_version(session, tenant_id=tenant.id, name="bot", ref=ref)
        assert [file.blob.refs for file in blobs] == [0, 0]
        assert make_version(session, adapter).version == 2
        assert_refs_match_rows(session)

    def test_the_record_stays(self, session: Session, adapter: Adapter) -> None:
        version = make_version(session, adapter, manifest={"files": [{"path": "a"}]})
        delete_version(session, version)
        session.expire_all()
        kept = session.get_one(Version, version.id)
        assert kept.deleted_at is not None
        assert kept.manifest == {"files": [{"path": "a"}]}

    def test_an_aliased_version_stays_until_the_alias_moves(self, session: Session, adapter: Adapter) -> None:
        one, _ = make_version(session, adapter), make_version(session, adapter)
        set_alias(session, adapter, name="prod", version=1)
        set_alias(session, adapter, name="canary", version=1)
        with pytest.raises(VersionInUse) as caught:
            delete_version(session, one)
        assert caught.value.details == {"aliases": ["canary", "prod"]}
        set_alias(session, adapter, name="prod", version=2)
        delete_alias(session, adapter, name="canary")
        delete_version(session, one)
        assert_refs_match_rows(session)

    @pytest.mark.parametrize("state", ["queued", "running", "cancelling"])
    def test_a_version_that_is_being_merged_stays(self, session: Session, adapter: Adapter, state: str) -> None:
        version = make_version(session, adapter)
        merge = make_merge(session, version, state=state)
        with pytest.raises(VersionInUse) as caught:
            delete_version(session, version)
        assert caught.value.details == {"merge": public_id("merge", merge.id)}
        assert_refs_match_rows(session)

    def test_ended_merges_go_with_their_version(self, session: Session, adapter: Adapter) -> None:
        version, other = make_version(session, adapter), make_version(session, adapter)
        done, failed = make_merge(session, version), make_merge(session, version, state="failed", dtype="float32")
        kept = make_merge(session, other)
        delete_version(session, version)
        assert_refs_match_rows(session)
        session.expire_all()
        assert (done.live, failed.live, kept.live) == (False, False, True)
        assert [file.merge_id for file in session.scalars(select(MergeFile))] == [kept.id]

    def test_deleting_twice_is_not_found(self, session: Session, adapter: Adapter) -> None:
        version = make_version(session, adapter)
        delete_version(session, version)
        with pytest.raises(VersionNotFound):
            delete_version(session, version)
        assert_refs_match_rows(session)

    def test_the_schema_refuses_to_bring_a_version_back(self, session: Session, adapter: Adapter) -> None:
        version = make_version(session, adapter)
        delete_version(session, version)
        version.deleted_at = datetime.now(UTC)
        with pytest.raises(Exception, match="immutable"):
            session.flush()

    def test_two_deletes_drop_references_once(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            version = make_version(session, make_adapter(session, make_tenant(session)))

        def delete() -> None:
            with transaction(sessions) as session:
                delete_version(session, session.get_one(Version, version.id))

        results = race(*[delete] * 4)
        assert results.count(None) == 1
        assert sum(isinstance(result, VersionNotFound) for result in results) == 3
        with sessions() as session:
            assert_refs_match_rows(session)

    def test_an_alias_never_points_at_a_deleted_version(self, sessions: SessionFactory) -> None:
        for _ in range(10):
            with transaction(sessions) as session:
                adapter = make_adapter(session, make_tenant(session))
                version = make_version(session, adapter)

            def delete(version: Version = version) -> str:
                with transaction(sessions) as session:
                    delete_version(session, session.get_one(Version, version.id))
                return "deleted"

            def point(adapter: Adapter = adapter) -> str:
                with transaction(sessions) as session:
                    set_alias(session, session.get_one(Adapter, adapter.id), name="prod", version=1)
                return "aliased"

            contestants: list[Callable[[], str]] = [delete, point]
            deleted, aliased = race(*contestants)
            if deleted == "deleted":
                assert isinstance(aliased, VersionNotFound)
            else:
                assert isinstance(deleted, VersionInUse)
                assert aliased == "aliased"
