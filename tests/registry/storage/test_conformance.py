"""One suite for every store: what `ObjectStore` promises."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import ArtifactCorrupt, ObjectMissing, StorageUnavailable
from registry.storage import ObjectStat, ObjectStore
from tests.registry.storage.conftest import PART_BYTES, Lane, LinkRefused
from tests.registry.storage.sample import Sample, make_sample

SEVERAL_PARTS = 2 * PART_BYTES + 12_345


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_sample(tmp_path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path alone in its folder, so that whatever else turns up there is a leftover."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "file"


@pytest.mark.parametrize("size", [0, 1, 2**20 + 1, PART_BYTES, SEVERAL_PARTS])
def test_what_was_put_is_fetched(lane: Lane, tmp_path: Path, target: Path, size: int) -> None:
    sample = make_sample(tmp_path, size)
    lane.store.put(sample.key, sample.path, **sample.facts)
    lane.store.fetch(sample.key, target, **sample.facts)
    assert target.read_bytes() == sample.data
    assert list(target.parent.iterdir()) == [target]
    assert b"".join(lane.store.open(sample.key)) == sample.data
    assert lane.store.stat(sample.key) == ObjectStat(sample.key, size)
    assert lane.leftovers() == []


def test_a_range_is_a_slice(lane: Lane, sample: Sample) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    offsets = st.integers(0, sample.size + 20)

    @given(offsets, st.none() | offsets)
    @settings(max_examples=60, deadline=None)
    def check(start: int, end: int | None) -> None:
        if end is not None and end < start:
            start, end = end, start
        assert b"".join(lane.store.open(sample.key, start=start, end=end)) == sample.data[start:end]

    check()


def test_ranges_reach_across_parts(lane: Lane, tmp_path: Path) -> None:
    sample = make_sample(tmp_path, SEVERAL_PARTS)
    lane.store.put(sample.key, sample.path, **sample.facts)
    for start, end in [(PART_BYTES - 3, PART_BYTES + 3), (10, 2 * PART_BYTES + 1), (SEVERAL_PARTS - 1, None)]:
        assert b"".join(lane.store.open(sample.key, start=start, end=end)) == sample.data[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (5, 4), (0, -1)])
def test_backward_ranges_are_refused(lane: Lane, sample: Sample, start: int, end: int | None) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    with pytest.raises(ValueError, match="not a range"):
        lane.store.open(sample.key, start=start, end=end)


def test_an_abandoned_read_leaves_the_store_usable(lane: Lane, tmp_path: Path) -> None:
    sample = make_sample(tmp_path, SEVERAL_PARTS)
    lane.store.put(sample.key, sample.path, **sample.facts)
    for _ in range(40):  # more than the connections a client keeps
        chunks = lane.store.open(sample.key)
        assert next(chunks) == sample.data[: 2**20]
        chunks.close()
    assert lane.store.stat(sample.key).size == sample.size


def test_a_missing_object_is_named_by_the_call(lane: Lane, sample: Sample, target: Path) -> None:
    for call in [lane.store.stat, lane.store.open, partial(lane.store.open, start=3, end=3)]:
        with pytest.raises(ObjectMissing) as caught:
            call(sample.key)
        assert caught.value.details == {"key": sample.key}
    with pytest.raises(ObjectMissing):
        lane.store.fetch(sample.key, target, **sample.facts)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1], lambda data: data + b"x"],
    ids=["one bit", "too short", "too long"],
)
def test_damaged_bytes_are_never_fetched(
    lane: Lane, sample: Sample, target: Path, damage: Callable[[bytes], bytes]
) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    lane.overwrite(sample.key, damage(sample.data))
    target.write_bytes(b"as before")
    with pytest.raises(ArtifactCorrupt):
        lane.store.fetch(sample.key, target, **sample.facts)
    assert target.read_bytes() == b"as before"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_a_file_that_is_not_what_was_promised_is_not_stored(lane: Lane, tmp_path: Path, size: int) -> None:
    sample = make_sample(tmp_path, size)
    for wrong in [{"sha256": "0" * 64}, {"size": size - 1}, {"size": size + 1}]:
        with pytest.raises(ArtifactCorrupt):
            lane.store.put(sample.key, sample.path, **(sample.facts | wrong))
    assert list(lane.store.list("")) == []
    assert lane.leftovers() == []


def test_equal_bytes_may_be_put_again(lane: Lane, sample: Sample) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    lane.store.put(sample.key, sample.path, **sample.facts)
    assert b"".join(lane.store.open(sample.key)) == sample.data


def test_a_key_never_changes_its_bytes(lane: Lane, sample: Sample, tmp_path: Path) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    other = make_sample(tmp_path, sample.data[::-1])
    with pytest.raises(ArtifactCorrupt):
        lane.store.put(sample.key, other.path, **other.facts)
    assert b"".join(lane.store.open(sample.key)) == sample.data
    assert lane.leftovers() == []


@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_writers_of_equal_bytes_do_not_disturb_each_other(lane: Lane, tmp_path: Path, target: Path, size: int) -> None:
    # Every writer has a key of its own (`keys.blob_key`): stores need not arbitrate two that race for one, and
    # rclone does not.
    first = make_sample(tmp_path, size)
    samples = [first, *(make_sample(tmp_path, first.data) for _ in range(3))]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda sample: lane.store.put(sample.key, sample.path, **sample.facts), samples))
    for sample in samples:
        lane.store.fetch(sample.key, target, **sample.facts)
        target.unlink()
    assert lane.leftovers() == []


def test_delete_is_idempotent_and_takes_one_object(lane: Lane, sample: Sample, tmp_path: Path) -> None:
    twin = make_sample(tmp_path, sample.data)
    for one in (sample, twin):
        lane.store.put(one.key, one.path, **one.facts)
    lane.store.delete(sample.key)
    lane.store.delete(sample.key)
    assert [found.key for found in lane.store.list("")] == [twin.key]
    with pytest.raises(ObjectMissing):
        lane.store.stat(sample.key)
    lane.store.put(sample.key, sample.path, **sample.facts)
    assert b"".join(lane.store.open(sample.key)) == sample.data


def test_list_finds_all_that_start_with_the_prefix(lane: Lane, sample: Sample) -> None:
    keys = ["blobs/aa/1", "blobs/aa/2", "blobs/ab/3", "blobs/ac/4", "blobs/ac/5", "other/6"]
    for key in keys:
        lane.store.put(key, sample.path, **sample.facts)
    for prefix in ["", "b", "blobs", "blobs/", "blobs/a", "blobs/ac", "blobs/ac/", "blobs/ac/5", "none", "blobs/zz/"]:
        found = sorted(lane.store.list(prefix), key=lambda item: item.key)
        assert found == [ObjectStat(key, sample.size) for key in keys if key.startswith(prefix)]


def test_list_passes_over_what_is_not_an_object_of_ours(lane: Lane, sample: Sample) -> None:
    lane.store.put("blobs/aa/1", sample.path, **sample.facts)
    lane.overwrite("blobs/aa/Strange Name", b"x")
    lane.overwrite("blobs/aa/.hidden", b"x")
    assert [found.key for found in lane.store.list("")] == ["blobs/aa/1"]


BAD_KEYS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    "A",
    "a b",
    "a..b",
    "a\n",
    ".incoming/x",
    "a/.b",
    "é",
    "a\\b",
    "a\0",
]


@pytest.mark.parametrize("key", [*BAD_KEYS, "a" * 256, "a/" * 450 + "a"])
def test_bad_keys_are_refused_everywhere(lane: Lane, sample: Sample, key: str) -> None:
    calls = operations(lane.store, key, sample)
    calls["link"] = lambda: lane.store.link(key, filename="f", seconds=60)
    del calls["ping"], calls["list"]
    for call in calls.values():
        with pytest.raises(ValueError, match="not an object key"):
            call()


@pytest.mark.parametrize("prefix", ["/", "..", "../", "a/../", ".incoming", "a//", "A"])
def test_bad_prefixes_are_refused(lane: Lane, prefix: str) -> None:
    with pytest.raises(ValueError, match="not the start of an object key"):
        list(lane.store.list(prefix))


def test_a_link_serves_the_bytes_as_an_attachment(lane: Lane, sample: Sample) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    disposition, body = lane.visit(lane.store.link(sample.key, filename="adapter.safetensors", seconds=60))
    assert body == sample.data
    assert disposition == "attachment; filename=\"adapter.safetensors\"; filename*=UTF-8''adapter.safetensors"


@pytest.mark.parametrize(
    ("filename", "saved"),
    [
        ('say "hi".bin', 'say "hi".bin'),
        ("naïve 模型.bin", "naïve 模型.bin"),
        ("a\r\nSet-Cookie: b=c", "a__Set-Cookie: b=c"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("100%; x=y", "100%; x=y"),
    ],
)
def test_awkward_filenames_survive_a_link(lane: Lane, sample: Sample, filename: str, saved: str) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    disposition, body = lane.visit(lane.store.link(sample.key, filename=filename, seconds=60))
    assert body == sample.data
    whole = re.fullmatch(r"attachment; filename=\"[^\"\r\n]*\"; filename\*=UTF-8''([\w.~%-]+)", disposition, re.A)
    assert whole
    assert unquote(whole[1]) == saved


def test_a_changed_link_is_refused(lane: Lane, sample: Sample, tmp_path: Path) -> None:
    other = make_sample(tmp_path, 7)
    for one in (sample, other):
        lane.store.put(one.key, one.path, **one.facts)
    link = lane.store.link(sample.key, filename="f", seconds=60)
    flipped = link[:-1] + ("0" if link[-1] != "0" else "1")
    # The part before the signature, grafted from a link that is valid for something else.
    foreign = lane.store.link(other.key, filename="f", seconds=60)
    joint = "X-Amz-Signature=" if "X-Amz-Signature=" in link else "."
    grafted = foreign.rpartition(joint)[0] + joint + link.rpartition(joint)[2]
    lane.visit(link)
    for changed in [flipped, grafted]:
        with pytest.raises(LinkRefused):
            lane.visit(changed)


def test_an_expired_link_is_refused(lane: Lane, sample: Sample) -> None:
    lane.store.put(sample.key, sample.path, **sample.facts)
    link = lane.store.link(sample.key, filename="f", seconds=1)
    time.sleep(2.1)
    with pytest.raises(LinkRefused):
        lane.visit(link)


def test_ping_answers(lane: Lane) -> None:
    lane.store.ping()


def test_an_outage_is_storage_unavailable(lane: Lane, sample: Sample, target: Path) -> None:
    sample.path.with_name("beside").touch()

    def outcome(call: Callable[[], object]) -> type[BaseException] | None:
        try:
            call()
        except Exception as error:
            return type(error)
        return None

    calls = operations(lane.unreachable, sample.key, sample)
    with ThreadPoolExecutor(len(calls)) as pool:  # together, because each waits between its retries
        outcomes = dict(zip(calls, pool.map(outcome, calls.values()), strict=True))
    assert outcomes == dict.fromkeys(calls, StorageUnavailable)
    assert list(sample.path.parent.glob(".*.part")) == []


def operations(store: ObjectStore, key: str, sample: Sample) -> dict[str, Callable[[], object]]:
    """Every call that reaches the store."""
    return {
        "put": lambda: store.put(key, sample.path, **sample.facts),
        "open": lambda: store.open(key),
        "stat": lambda: store.stat(key),
        "fetch": lambda: store.fetch(key, sample.path.with_name("fetched"), **sample.facts),
        "delete": lambda: store.delete(key),
        "list": lambda: list(store.list("blobs/")),
        "ping": store.ping,
    }
