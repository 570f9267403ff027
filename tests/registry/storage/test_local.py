"""What only a directory can get wrong."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.errors import ArtifactCorrupt, ObjectMissing, StorageUnavailable
from registry.storage.digests import receive
from registry.storage.local import LocalStore
from tests.registry.storage.conftest import SECRET
from tests.registry.storage.sample import Sample, make_sample
from tests.registry.storage.test_conformance import operations


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return make_store(root)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_sample(tmp_path)


def make_store(root: Path) -> LocalStore:
    return LocalStore(root, secret=SECRET, public_url="http://depot.test")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Writing further fails in this process, the way it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_symbolic_link_is_never_followed(store: LocalStore, root: Path, sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    secret = tmp_path / "outside" / "secret"
    secret.write_bytes(sample.data)
    (root / "blobs").mkdir()
    (root / "blobs" / "file").symlink_to(secret)
    (root / "blobs" / "folder").symlink_to(secret.parent)
    for key in ["blobs/file", "blobs/folder/secret"]:
        calls = operations(store, key, sample)
        for name in ("put", "open", "stat", "fetch", "delete"):
            with pytest.raises(ValueError, match="symbolic link"):
                calls[name]()
    assert list(store.list("")) == []
    assert [path.name for path in secret.parent.iterdir()] == ["secret"]


def test_a_store_reached_through_a_symbolic_link_works(store: LocalStore, root: Path, sample: Sample) -> None:
    root.with_name("alias").symlink_to(root)
    make_store(root.with_name("alias")).put(sample.key, sample.path, **sample.facts)
    assert store.stat(sample.key).size == sample.size


def test_one_of_two_racing_writers_of_a_key_wins(store: LocalStore, tmp_path: Path) -> None:
    rivals = [make_sample(tmp_path, bytes([n]) * 300_000) for n in range(4)]

    def put(rival: Sample) -> bool:
        try:
            store.put("blobs/contested", rival.path, **rival.facts)
        except ArtifactCorrupt:
            return False
        return True

    with ThreadPoolExecutor(len(rivals)) as pool:
        won = list(pool.map(put, rivals))
    assert won.count(True) == 1
    assert b"".join(store.open("blobs/contested")) == rivals[won.index(True)].data


def test_a_put_survives_deletes_that_prune_its_folder(store: LocalStore, tmp_path: Path) -> None:
    sample = make_sample(tmp_path, 10)

    def put_and_delete(writer: int) -> None:
        for _ in range(100):
            key = f"blobs/aa/bb/{writer}"
            store.put(key, sample.path, **sample.facts)
            assert store.stat(key).size == 10
            store.delete(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_delete, range(4)))
    assert list(store.list("")) == []


def test_a_put_makes_its_folder_again_when_a_delete_took_it(
    store: LocalStore, root: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def link_after_prune(part: Path, target: Path) -> None:
        attempts.append(target)
        if len(attempts) == 1:
            target.parent.rmdir()
        link(part, target)

    link = os.link
    monkeypatch.setattr(os, "link", link_after_prune)
    store.put(sample.key, sample.path, **sample.facts)
    assert attempts == [root / sample.key] * 2
    assert store.stat(sample.key).size == sample.size


def test_delete_leaves_no_empty_folders(store: LocalStore, root: Path, sample: Sample) -> None:
    store.put(sample.key, sample.path, **sample.facts)
    store.delete(sample.key)
    assert [path.name for path in root.iterdir()] == [".incoming"]


def test_a_folder_is_not_an_object(store: LocalStore, sample: Sample) -> None:
    store.put(sample.key, sample.path, **sample.facts)
    folder = sample.key.rpartition("/")[0]
    for read in (store.stat, store.open):
        with pytest.raises(ObjectMissing):
            read(folder)
    store.delete(folder)
    assert [found.key for found in store.list("")] == [sample.key]


def test_an_empty_mount_point_is_an_outage_and_not_missing_objects(
    store: LocalStore, root: Path, sample: Sample
) -> None:
    store.put(sample.key, sample.path, **sample.facts)
    shutil.rmtree(root)
    root.mkdir()
    for call in operations(store, sample.key, sample).values():
        with pytest.raises(StorageUnavailable):
            call()


def test_a_file_cut_short_while_it_is_read_is_an_outage(store: LocalStore, root: Path, tmp_path: Path) -> None:
    sample = make_sample(tmp_path, 3 * 2**20)
    store.put(sample.key, sample.path, **sample.facts)
    chunks = store.open(sample.key)
    assert len(next(chunks)) == 2**20
    os.truncate(root / sample.key, 2**20 + 10)
    with pytest.raises(StorageUnavailable, match="broke off"):
        list(chunks)


def test_a_full_disk_is_an_outage_and_leaves_nothing(store: LocalStore, root: Path, sample: Sample) -> None:
    with files_end_at(500), pytest.raises(StorageUnavailable):
        store.put(sample.key, sample.path, **sample.facts)
    assert list((root / ".incoming").iterdir()) == []
    assert list(store.list("")) == []


def test_a_full_disk_of_the_reader_leaves_nothing(store: LocalStore, sample: Sample, tmp_path: Path) -> None:
    store.put(sample.key, sample.path, **sample.facts)
    (tmp_path / "target").mkdir()
    with files_end_at(500), pytest.raises(OSError, match="large"):
        store.fetch(sample.key, tmp_path / "target" / "file", **sample.facts)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path: Path, sample: Sample) -> None:
    (tmp_path / "target" / "file").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        receive([sample.data], tmp_path / "target" / "file", **sample.facts)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]


def test_what_a_killed_writer_left_goes_after_a_day(store: LocalStore, root: Path) -> None:
    old, young = root / ".incoming" / "old", root / ".incoming" / "young"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    make_store(root)
    assert not old.exists()
    assert young.exists()
