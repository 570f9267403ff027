import random
import uuid
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry.blobs import drop_refs, store_file, take_refs
from registry.db import SessionFactory, transaction
from registry.errors import ArtifactCorrupt, BlobGone
from registry.models import Blob
from registry.storage.base import ObjectStore
from registry.storage.digests import digest_file
from tests.factories import digest_of, make_blob, make_tenant
from tests.registry.race import race


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"some bytes")
    return path


def refs(session: Session, blob: Blob) -> int:
    return session.scalars(select(Blob.refs).where(Blob.id == blob.id)).one()


def collect(session: Session, blob_id: uuid.UUID) -> bool:
    """What garbage collection does to a blob that nobody refers to."""
    condemned = update(Blob).where(Blob.id == blob_id, Blob.refs == 0, Blob.state == "stored")
    return session.scalar(condemned.values(state="condemned").returning(Blob.id)) is not None


class TestStoreFile:
    def test_bytes_are_stored_under_their_own_key(
        self, sessions: SessionFactory, store: ObjectStore, source: Path
    ) -> None:
        sha256, size = digest_file(source)
        with transaction(sessions) as session:
            tenant = make_tenant(session)
        job_id = uuid.uuid4()
        blob_id = store_file(
            sessions, store, source, sha256=sha256, size=size, tenant_id=tenant.id, job_id=job_id, fence=4
        )
        with sessions() as session:
            blob = session.get_one(Blob, blob_id)
        assert (blob.state, blob.refs, blob.sha256, blob.size) == ("stored", 0, sha256, size)
        assert (blob.tenant_id, blob.job_id, blob.fence) == (tenant.id, job_id, 4)
        assert b"".join(store.open(blob.key)) == b"some bytes"

    def test_bytes_that_arrive_after_their_collection_do_not_stay(
        self, sessions: SessionFactory, store: ObjectStore, source: Path
    ) -> None:
        class Slow:
            """The store, with a collector that is done before an upload is."""

            def put(self, key: str, path: Path, *, sha256: str, size: int) -> None:
                with transaction(sessions) as session:
                    session.execute(update(Blob).where(Blob.key == key).values(state="deleted"))
                store.put(key, path, sha256=sha256, size=size)

            def delete(self, key: str) -> None:
                store.delete(key)

        sha256, size = digest_file(source)
        with pytest.raises(BlobGone):
            store_file(sessions, cast(ObjectStore, Slow()), source, sha256=sha256, size=size)
        assert list(store.list("")) == []

    def test_equal_bytes_stored_twice_are_two_blobs(
        self, sessions: SessionFactory, store: ObjectStore, source: Path
    ) -> None:
        sha256, size = digest_file(source)
        first, second = (store_file(sessions, store, source, sha256=sha256, size=size) for _ in range(2))
        with sessions() as session:
            assert session.get_one(Blob, first).key != session.get_one(Blob, second).key

    def test_a_failed_put_leaves_an_intent_that_nobody_can_refer_to(
        self, sessions: SessionFactory, store: ObjectStore, source: Path
    ) -> None:
        with pytest.raises(ArtifactCorrupt):
            store_file(sessions, store, source, sha256=digest_of("other bytes"), size=10)
        with sessions() as session:
            blob = session.scalars(select(Blob)).one()
            assert (blob.state, blob.refs) == ("intent", 0)
            with pytest.raises(BlobGone):
                take_refs(session, [blob.id])

    def test_the_row_exists_before_the_first_byte(
        self, sessions: SessionFactory, store: ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put, seen = store.put, []

        def spy(key: str, path: Path, *, sha256: str, size: int) -> None:
            with sessions() as session:
                seen.append((key, session.scalar(select(Blob.key).where(Blob.state == "intent"))))
            put(key, path, sha256=sha256, size=size)

        monkeypatch.setattr(store, "put", spy)
        sha256, size = digest_file(source)
        store_file(sessions, store, source, sha256=sha256, size=size)
        assert [committed for _, committed in seen] == [key for key, _ in seen] != []

    def test_an_upload_that_was_collected_meanwhile_is_not_stored(
        self, sessions: SessionFactory, store: ObjectStore, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put = store.put

        def slow(key: str, path: Path, *, sha256: str, size: int) -> None:
            put(key, path, sha256=sha256, size=size)
            with transaction(sessions) as session:
                session.execute(update(Blob).values(state="condemned"))

        monkeypatch.setattr(store, "put", slow)
        sha256, size = digest_file(source)
        with pytest.raises(BlobGone):
            store_file(sessions, store, source, sha256=sha256, size=size)
        with sessions() as session:
            assert session.scalars(select(Blob.state)).one() == "condemned"


class TestTakeRefs:
    def test_counts_every_mention(self, session: Session) -> None:
        one, two = make_blob(session), make_blob(session)
        take_refs(session, [one.id, two.id, one.id])
        assert (refs(session, one), refs(session, two)) == (2, 1)

    @pytest.mark.parametrize("state", ["intent", "condemned", "deleted"])
    def test_refuses_bytes_that_are_not_stored(self, session: Session, state: str) -> None:
        good, bad = make_blob(session), make_blob(session, state=state)
        with pytest.raises(BlobGone) as caught:
            take_refs(session, [good.id, bad.id])
        assert caught.value.details == {"blob_id": str(bad.id)}

    def test_refuses_a_blob_that_does_not_exist(self, session: Session) -> None:
        with pytest.raises(BlobGone):
            take_refs(session, [uuid.uuid4()])

    def test_a_loaded_blob_shows_the_new_count(self, session: Session) -> None:
        blob = make_blob(session)
        take_refs(session, [blob.id])
        assert blob.refs == 1

    def test_a_blob_is_referenced_or_collected_but_never_both(self, sessions: SessionFactory) -> None:
        for _ in range(10):
            with transaction(sessions) as session:
                blob = make_blob(session)

            def publish(blob: Blob = blob) -> bool:
                with transaction(sessions) as session:
                    take_refs(session, [blob.id])
                return True

            def sweep(blob: Blob = blob) -> bool:
                with transaction(sessions) as session:
                    return collect(session, blob.id)

            published, swept = race(publish, sweep)
            assert (published is True) != (swept is True)
            assert published is True or isinstance(published, BlobGone)

    def test_a_collector_that_waited_for_a_reference_loses(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            blob = make_blob(session)
        with sessions() as publisher, sessions() as collector:
            assert collector.scalar(select(Blob.refs).where(Blob.id == blob.id)) == 0
            take_refs(publisher, [blob.id])
            publisher.commit()
            assert not collect(collector, blob.id)

    def test_opposite_orders_do_not_deadlock(self, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            ids = [make_blob(session).id for _ in range(12)]
        orders = [random.Random(seed).sample(ids, len(ids)) for seed in range(6)]

        def take(order: list[uuid.UUID]) -> None:
            with transaction(sessions) as session:
                take_refs(session, order)

        assert race(*(lambda order=order: take(order) for order in orders)) == [None] * 6
        with sessions() as session:
            assert set(session.scalars(select(Blob.refs))) == {6}


class TestDropRefs:
    def test_drops_every_mention(self, session: Session) -> None:
        one, two = make_blob(session, refs=3), make_blob(session, refs=1)
        drop_refs(session, [one.id, two.id, one.id])
        assert (refs(session, one), refs(session, two)) == (1, 0)

    def test_bytes_without_references_stay_until_they_are_collected(self, session: Session) -> None:
        blob = make_blob(session, refs=1)
        drop_refs(session, [blob.id])
        assert session.scalars(select(Blob.state).where(Blob.id == blob.id)).one() == "stored"
