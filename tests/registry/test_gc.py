"""Bytes go when nobody refers to them, and never before."""

import functools
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from registry.blobs import drop_refs, store_file, take_refs
from registry.db import SessionFactory, transaction
from registry.errors import BlobGone, StorageUnavailable
from registry.gc import Amount, collect, condemn, survey
from registry.models import Blob, IdempotencyKey, Job, Outbox
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from tests.factories import make_adapter, make_job, make_tenant
from tests.registry.race import race

NOTHING = Amount(0, 0)
GRACE = 3600.0


@pytest.fixture
def put(sessions: SessionFactory, store: ObjectStore, tmp_path: Path) -> Any:
    def put_bytes(data: bytes = b"bytes", **over: Any) -> uuid.UUID:
        path = tmp_path / uuid.uuid4().hex
        path.write_bytes(data)
        sha256, size = digest_file(path)
        return store_file(sessions, store, path, sha256=sha256, size=size, **over)

    return put_bytes


def age(sessions: SessionFactory, column: str, hours: float = 2.0) -> None:
    """As if everything had been made, or condemned, so much earlier."""
    with transaction(sessions) as session:
        old = text(f"{column} - interval '{hours} hours'")
        session.execute(update(Blob).values({column: old}))


def blob(sessions: SessionFactory, blob_id: uuid.UUID) -> Blob:
    with sessions() as session:
        return session.get_one(Blob, blob_id)


def refer(sessions: SessionFactory, blob_id: uuid.UUID) -> None:
    with transaction(sessions) as session:
        take_refs(session, [blob_id])


def test_garbage_is_condemned_then_freed(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    blob_id = put(b"12345")
    key = blob(sessions, blob_id).key
    assert collect(sessions, store, grace_seconds=GRACE).condemned == NOTHING  # it is young
    age(sessions, "created_at")
    done = collect(sessions, store, grace_seconds=GRACE)
    assert (done.condemned, done.freed) == (Amount(1, 5), NOTHING)
    assert store.stat(key).size == 5
    age(sessions, "condemned_at")
    done = collect(sessions, store, grace_seconds=GRACE)
    assert (done.condemned, done.freed) == (NOTHING, Amount(1, 5))
    assert list(store.list("blobs/")) == [] and blob(sessions, blob_id).state == "deleted"
    assert collect(sessions, store, grace_seconds=GRACE).freed == NOTHING


def test_what_is_referred_to_stays(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    blob_id = put()
    refer(sessions, blob_id)
    age(sessions, "created_at", hours=10_000)
    assert collect(sessions, store, grace_seconds=GRACE).condemned == NOTHING
    with transaction(sessions) as session:
        drop_refs(session, [blob_id])
    assert collect(sessions, store, grace_seconds=GRACE).condemned.objects == 1


def test_what_is_condemned_cannot_be_referred_to(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    blob_id = put()
    age(sessions, "created_at")
    collect(sessions, store, grace_seconds=GRACE)
    with pytest.raises(BlobGone):
        refer(sessions, blob_id)


def test_an_upload_that_never_ended_is_garbage_too(sessions: SessionFactory, store: ObjectStore) -> None:
    with transaction(sessions) as session:
        key = f"blobs/00/{'0' * 64}/{uuid.uuid4().hex}"
        session.add(Blob(sha256="0" * 64, size=7, key=key))
    age(sessions, "created_at")
    collect(sessions, store, grace_seconds=GRACE)
    age(sessions, "condemned_at")
    assert collect(sessions, store, grace_seconds=GRACE).freed == Amount(1, 7)


@pytest.mark.parametrize(
    ("state", "same_fence", "spared"), [("running", True, 1), ("running", False, 0), ("failed", True, 0)]
)
def test_what_a_running_attempt_stored_is_spared(
    sessions: SessionFactory, store: ObjectStore, put: Any, state: str, same_fence: bool, spared: int
) -> None:
    with transaction(sessions) as session:
        job = make_job(session, make_adapter(session, make_tenant(session)), state=state)
        fence = job.fence or 0
    age(sessions, "created_at")
    collect(sessions, store, grace_seconds=GRACE)  # what the factories made
    put(job_id=job.id, fence=fence if same_fence else fence - 1)
    age(sessions, "created_at")
    assert collect(sessions, store, grace_seconds=GRACE).condemned.objects == 1 - spared


def test_of_a_reference_and_a_condemnation_exactly_one_wins(sessions: SessionFactory, put: Any) -> None:
    ids = [put() for _ in range(12)]
    age(sessions, "created_at")

    def collector() -> int:
        with transaction(sessions) as session:
            return condemn(session, grace=timedelta(0)).objects

    calls = [functools.partial(refer, sessions, blob_id) for blob_id in ids]
    results = race(collector, *calls, collector)
    won = sum(result is None for result in results)
    condemned = sum(result for result in results if isinstance(result, int))
    assert won + condemned == len(ids)
    with sessions() as session:
        states = dict(session.execute(select(Blob.state, func.count()).group_by(Blob.state)).all())
    assert states.get("stored", 0) == won and states.get("condemned", 0) == condemned


def test_two_collectors_count_a_byte_once(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    for n in range(20):
        put(bytes(n))
    age(sessions, "created_at")
    collect(sessions, store, grace_seconds=GRACE)
    age(sessions, "condemned_at")
    both = race(*[functools.partial(collect, sessions, store, grace_seconds=GRACE)] * 2)
    assert sum(done.freed.bytes for done in both if not isinstance(done, Exception)) == sum(range(20))


def test_a_store_that_is_away_loses_nothing(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    put()
    age(sessions, "created_at")
    collect(sessions, store, grace_seconds=GRACE)
    age(sessions, "condemned_at")

    class Away:
        def delete(self, key: str) -> None:
            raise StorageUnavailable

    with pytest.raises(StorageUnavailable):
        collect(sessions, Away(), grace_seconds=GRACE)  # type: ignore[arg-type]  # all that a sweep calls
    assert collect(sessions, store, grace_seconds=GRACE).freed.objects == 1


def test_a_dry_run_tells_and_changes_nothing(sessions: SessionFactory, store: ObjectStore, put: Any) -> None:
    put(b"123")
    age(sessions, "created_at")
    for _ in range(2):
        with sessions() as session:
            found = survey(session, grace_seconds=GRACE)
        assert (found.condemn, found.sweep) == (Amount(1, 3), NOTHING)
    collect(sessions, store, grace_seconds=GRACE)
    age(sessions, "condemned_at")
    with sessions() as session:
        found = survey(session, grace_seconds=GRACE)
    assert (found.condemn, found.sweep) == (NOTHING, Amount(1, 3))


def test_old_rows_go_and_what_was_not_sent_stays(sessions: SessionFactory, store: ObjectStore) -> None:
    with transaction(sessions) as session:
        tenant = make_tenant(session)
        job = make_job(session, make_adapter(session, tenant))
        old, young = (func.clock_timestamp() - text(f"interval '{hours} hours'") for hours in (73, 71))
        session.add_all(Outbox(queue="q", job_id=job.id, created_at=old, sent_at=sent) for sent in (old, young, None))
        session.add_all(
            IdempotencyKey(
                tenant_id=tenant.id, scope="s", key=name, request_sha256=b"", job_id=job.id, created_at=created
            )
            for name, created in (("old", old), ("young", young))
        )
    assert collect(sessions, store, grace_seconds=GRACE).purged_rows == 2
    with sessions() as session:
        assert session.scalars(select(func.count()).select_from(Outbox)).one() == 2
        assert session.scalars(select(IdempotencyKey.key)).all() == ["young"]
        assert session.scalars(select(func.count()).select_from(Job)).one() == 1
