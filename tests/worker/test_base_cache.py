"""A base is fetched once, looked at every time, and fetched again when it is not what it should be."""

import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from registry.apart import run_apart
from registry.errors import ArtifactCorrupt, CancelRequested
from registry.jobs.inputs import StoredFile
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from registry.storage.keys import blob_key
from worker.base_cache import INCOMING, BaseCache

DIGEST = "d" * 64


def nothing() -> None:
    pass


class Counting:
    """A store that counts what is fetched from it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.fetched: list[str] = []

    def fetch(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        self.fetched.append(key)
        self.store.fetch(key, path, sha256=sha256, size=size)


@pytest.fixture
def counting(store: ObjectStore) -> Counting:
    return Counting(store)


@pytest.fixture
def files(store: ObjectStore, tmp_path: Path) -> list[StoredFile]:
    return [put(store, tmp_path, name) for name in ("config.json", "model.safetensors")]


def put(store: ObjectStore, tmp_path: Path, name: str) -> StoredFile:
    path = tmp_path / name
    path.write_bytes(name.encode() * 100)
    sha256, size = digest_file(path)
    key = blob_key(sha256, uuid.uuid4())
    store.put(key, path, sha256=sha256, size=size)
    return StoredFile(name, key, sha256, size)


def test_what_nobody_uses_makes_room_the_oldest_first(
    counting: Counting, files: list[StoredFile], tmp_path: Path
) -> None:
    size = sum(file.size for file in files)
    cache = BaseCache(tmp_path / "cache", counting, max_bytes=2 * size)  # type: ignore[arg-type]  # it only fetches
    digests = [letter * 64 for letter in "abc"]
    for age, digest in enumerate(digests):
        with cache.using(digest):
            os.utime(cache.ensure(digest, files, nothing), (1000 + age, 1000 + age))
    assert [(tmp_path / "cache" / digest).exists() for digest in digests] == [False, True, True]
    counting.fetched.clear()
    with cache.using(digests[0]):
        cache.ensure(digests[0], files, nothing)
    assert counting.fetched == [file.key for file in files]


def test_a_base_in_use_is_never_evicted(counting: Counting, files: list[StoredFile], tmp_path: Path) -> None:
    cache = BaseCache(tmp_path / "cache", counting, max_bytes=1)  # type: ignore[arg-type]  # it only fetches
    with cache.using(DIGEST):
        folder = cache.ensure(DIGEST, files, nothing)
        with cache.using("e" * 64):
            other = cache.ensure("e" * 64, files, nothing)
        assert folder.exists() and not other.exists()
    assert not folder.exists()


@pytest.fixture
def cache(counting: Counting, tmp_path: Path) -> BaseCache:
    return BaseCache(tmp_path / "cache", counting)  # type: ignore[arg-type]  # the cache only fetches


def test_a_second_use_fetches_nothing(cache: BaseCache, counting: Counting, files: list[StoredFile]) -> None:
    folder = cache.ensure(DIGEST, files, nothing)
    assert cache.ensure(DIGEST, files, nothing) == folder
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == {file.path: file.size for file in files}
    assert counting.fetched == [file.key for file in files]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def flip(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_fetched_again(
    cache: BaseCache, counting: Counting, files: list[StoredFile], damage: Callable[[Path], None]
) -> None:
    folder = cache.ensure(DIGEST, files, nothing)
    damage(folder / "model.safetensors")
    cache.ensure(DIGEST, files, nothing)
    assert counting.fetched[2:] == [files[1].key]
    assert digest_file(folder / "model.safetensors") == (files[1].sha256, files[1].size)


def test_doubt_finds_damage_that_left_size_and_time_alone(
    cache: BaseCache, counting: Counting, files: list[StoredFile]
) -> None:
    path = cache.ensure(DIGEST, files, nothing) / "model.safetensors"
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache.ensure(DIGEST, files, nothing)
    assert counting.fetched[2:] == []
    cache.doubt(DIGEST)
    cache.ensure(DIGEST, files, nothing)
    assert counting.fetched[2:] == [files[1].key]


def test_bytes_that_are_wrong_in_the_store_are_never_used(
    cache: BaseCache, files: list[StoredFile], tmp_path: Path
) -> None:
    flip(tmp_path / "objects" / files[1].key)
    with pytest.raises(ArtifactCorrupt):
        cache.ensure(DIGEST, files, nothing)
    assert not (tmp_path / "cache" / DIGEST / "model.safetensors").exists()


def test_who_waits_for_another_to_fetch_can_still_give_up(cache: BaseCache, files: list[StoredFile]) -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        done.wait(120)

    holder = threading.Thread(target=lambda: cache.ensure(DIGEST, files, hold))
    holder.start()
    assert inside.wait(120)

    def give_up() -> None:
        raise CancelRequested

    with pytest.raises(CancelRequested):
        cache.ensure(DIGEST, files, give_up)
    done.set()
    holder.join()


class Swallowing:
    """A store that keeps whoever fetches waiting."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.inside, self.go = threading.Event(), threading.Event()

    def fetch(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        path.with_name(".half.part").write_bytes(b"half")
        self.inside.set()
        assert self.go.wait(120)
        self.store.fetch(key, path, sha256=sha256, size=size)


def test_a_fetch_that_was_left_to_itself_is_never_seen_in_the_base(
    cache: BaseCache, store: ObjectStore, files: list[StoredFile], tmp_path: Path
) -> None:
    swallowing = Swallowing(store)
    left: list[Future[None]] = []

    def leave(get: Callable[[], None]) -> None:
        left.append(run_apart(get, "left"))
        assert swallowing.inside.wait(120)
        raise CancelRequested

    names = {file.path for file in files}
    with pytest.raises(CancelRequested):
        BaseCache(tmp_path / "cache", swallowing).ensure(DIGEST, files, nothing, leave)  # type: ignore[arg-type]  # it only fetches
    assert list((tmp_path / "cache" / DIGEST).iterdir()) == []
    folder = cache.ensure(DIGEST, files, nothing)
    assert {path.name for path in folder.iterdir()} == names
    swallowing.go.set()
    wait(left)
    assert {path.name for path in folder.iterdir()} == names
    assert digest_file(folder / files[0].path) == (files[0].sha256, files[0].size)


def test_what_a_killed_worker_had_fetched_in_part_is_removed(cache: BaseCache, files: list[StoredFile]) -> None:
    folder = cache.ensure(DIGEST, files, nothing)
    (folder / ".0.part").write_bytes(b"half")
    (folder.with_suffix(INCOMING) / ".1.part").write_bytes(b"half")
    cache.ensure(DIGEST, files, nothing)
    assert {path.name for path in folder.iterdir()} == {file.path for file in files}
    assert not folder.with_suffix(INCOMING).exists()


def test_workers_that_make_room_at_the_same_time_do_not_trip_over_each_other(
    store: ObjectStore, files: list[StoredFile], tmp_path: Path
) -> None:
    def work(number: int) -> int:
        cache = BaseCache(tmp_path / "cache", store, max_bytes=1)
        for turn in range(25):
            digest = f"{(number + turn) % 5}" * 64
            with cache.using(digest):
                folder = cache.ensure(digest, files, nothing)
                assert {path.name for path in folder.iterdir()} >= {file.path for file in files}
        return number

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]
