"""Postgres and the store are compared, and every kind of difference has its word."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from registry.blobs import store_file
from registry.db import SessionFactory, transaction
from registry.files import create_file
from registry.models import Blob
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from registry.storage.keys import blob_key
from registry.verify import Difference, verify
from tests.factories import make_tenant


@pytest.fixture
def stored(sessions: SessionFactory, store: ObjectStore, tmp_path: Path) -> Blob:
    """The bytes of one file that a tenant owns."""
    path = tmp_path / "rows"
    path.write_bytes(b"some rows")
    sha256, size = digest_file(path)
    blob_id = store_file(sessions, store, path, sha256=sha256, size=size)
    with transaction(sessions) as session:
        tenant = make_tenant(session)
        create_file(session, tenant_id=tenant.id, blob_id=blob_id, filename="rows", purpose="fine-tune", report=None)
        return session.get_one(Blob, blob_id)


def differences(sessions: SessionFactory, store: ObjectStore, **options: bool) -> list[Difference]:
    return list(verify(sessions, store, **options))


def place(tmp_path: Path, blob: Blob) -> Path:
    return tmp_path / "objects" / blob.key


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(b"some")


def flip(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(b"some rowz")


def test_what_agrees_has_no_differences(sessions: SessionFactory, store: ObjectStore, stored: Blob) -> None:
    assert differences(sessions, store, digests=True) == []


@pytest.mark.parametrize(
    ("damage", "digests", "kinds"),
    [(remove, False, ["missing"]), (shorten, False, ["size"]), (flip, False, []), (flip, True, ["digest"])],
)
def test_damage_to_the_store_is_found(
    sessions: SessionFactory,
    store: ObjectStore,
    stored: Blob,
    tmp_path: Path,
    damage: Callable[[Path], None],
    digests: bool,
    kinds: list[str],
) -> None:
    damage(place(tmp_path, stored))
    found = differences(sessions, store, digests=digests)
    assert [difference.kind for difference in found] == kinds
    assert all(difference.subject == stored.key for difference in found)


@pytest.mark.parametrize("refs", [0, 2])
def test_a_wrong_count_is_found(sessions: SessionFactory, store: ObjectStore, stored: Blob, refs: int) -> None:
    with transaction(sessions) as session:
        session.execute(update(Blob).values(refs=refs))
    (found,) = differences(sessions, store)
    assert (found.kind, found.subject) == ("refs", stored.key)
    assert f"1 rows refer to it, but its count is {refs}" in found.message


def test_an_object_that_no_row_names_is_found(
    sessions: SessionFactory, store: ObjectStore, stored: Blob, tmp_path: Path
) -> None:
    path = tmp_path / "stranger"
    path.write_bytes(b"whose?")
    sha256, size = digest_file(path)
    key = blob_key(sha256, uuid.uuid4())
    store.put(key, path, sha256=sha256, size=size)
    (found,) = differences(sessions, store)
    assert (found.kind, found.subject) == ("stranger", key)


def test_garbage_on_its_way_out_is_no_difference(sessions: SessionFactory, store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(b"garbage")
    sha256, size = digest_file(path)
    store_file(sessions, store, path, sha256=sha256, size=size)
    for state in ("stored", "condemned"):
        with transaction(sessions) as session:
            session.execute(update(Blob).values(state=state))
        assert differences(sessions, store, digests=True) == []
    with transaction(sessions) as session:
        session.execute(update(Blob).values(state="deleted"))
    assert [difference.kind for difference in differences(sessions, store)] == ["stranger"]
