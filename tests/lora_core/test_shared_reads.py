"""Four adapters of one base, merged at the same time, read it once."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import pytest

from lora_core.floats import Array
from lora_core.merge import merge
from lora_core.merged import MergedCheckpoint
from lora_core.plan import plan_merge
from lora_core.shared import Shared
from lora_core.shared_reads import SharedReads
from lora_core.sources import ByteSource, LocalFiles
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base

FILE = "model.safetensors"


class Counted:
    """A folder that counts how often each of its bytes is read."""

    def __init__(self, directory: Path) -> None:
        self._files = LocalFiles(directory)
        self._lock = threading.Lock()
        self.bytes: Counter[str] = Counter()

    def size(self, path: str) -> int | None:
        return self._files.size(path)

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        with self._lock:
            self.bytes[path] += buffer.size
        self._files.read_into(path, offset, buffer)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, list[Path], list[bytes]]:
    """A base, four adapters, and the merged file of each."""
    folder = tmp_path_factory.mktemp("case")
    base = make_base(folder / "base", dtype="bfloat16", hidden=64)
    adapters, expected = [], []
    for number in range(4):
        modules = ["q_proj", "down_proj"] if number else ["q_proj", "v_proj"]
        scale = 0.1 * (1 + number)
        adapters.append(make_peft_adapter(base, folder / str(number), target_modules=modules, scale=scale))
        merge(base, adapters[-1], folder / f"out-{number}")
        expected.append((folder / f"out-{number}" / FILE).read_bytes())
    return base, adapters, expected


def open_merged(source: ByteSource, base: Path, adapter: Path) -> MergedCheckpoint:
    return MergedCheckpoint(source, LocalFiles(adapter), plan_merge(base, adapter).recipe)


def test_four_that_go_side_by_side_read_the_base_once(case):
    base, adapters, expected = case
    counted = Counted(base)
    shared = SharedReads(counted, Shared(2**16, lambda part: part.size), "base")
    merged = [open_merged(shared.reader(), base, adapter) for adapter in adapters[1:]]
    size = merged[0].files[FILE].size
    assert size > 3 * 2**16  # what is kept for the others is let go again
    headers = counted.bytes[FILE]
    streams = [checkpoint.read(FILE, 0, size) for checkpoint in merged]
    found = [b""] * len(streams)
    for parts in zip_longest(*streams):
        for number, part in enumerate(parts):
            found[number] += part.tobytes()
    assert found == expected[1:]
    assert counted.bytes[FILE] - headers <= size


def test_at_the_same_moment_one_reads_for_all(case):
    base, adapters, expected = case
    counted = Counted(base)
    shared = SharedReads(counted, Shared(2**24, lambda part: part.size), "base")
    merged = [open_merged(shared.reader(), base, adapter) for adapter in adapters]
    size = merged[0].files[FILE].size
    headers = counted.bytes[FILE]
    begin = threading.Barrier(4)

    def read_all(checkpoint: MergedCheckpoint) -> bytes:
        begin.wait(120)
        return b"".join(part.tobytes() for part in checkpoint.read(FILE, 0, size))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_all, merged)) == expected
    # one of the four changes other tensors: what it copies in one piece the others compute in blocks
    assert counted.bytes[FILE] - headers <= 2 * size


def test_one_alone_keeps_nothing_although_others_are_open(case):
    base, adapters, expected = case
    kept: list[int] = []
    shared = SharedReads(LocalFiles(base), Shared(2**24, lambda part: kept.append(part.size) or part.size), "base")
    merged = [open_merged(shared.reader(), base, adapter) for adapter in adapters]
    for _ in range(2):
        before = len(kept)
        assert b"".join(part.tobytes() for part in merged[0].read(FILE, 0, len(expected[0]))) == expected[0]
    assert before > 0  # while the others, which read their headers, are remembered
    assert len(kept) == before


def test_bases_in_one_cache_are_told_apart(case, tmp_path):
    base, adapters, expected = case
    other = make_base(tmp_path / "other", dtype="bfloat16", hidden=64, seed=1)
    cache: Shared[Array] = Shared(2**24, lambda part: part.size)
    ours, theirs = SharedReads(LocalFiles(base), cache, "ours"), SharedReads(LocalFiles(other), cache, "theirs")
    merged = [open_merged(ours.reader(), base, adapter) for adapter in adapters]
    foreign = [open_merged(theirs.reader(), other, adapter) for adapter in adapters]
    size = len(expected[0])
    first = [b"".join(part.tobytes() for part in checkpoint.read(FILE, 0, size)) for checkpoint in foreign]
    assert [b"".join(part.tobytes() for part in checkpoint.read(FILE, 0, size)) for checkpoint in merged] == expected
    assert all(one != two for one, two in zip(first, expected, strict=True))
