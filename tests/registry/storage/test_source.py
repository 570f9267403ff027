"""Stored objects read in parts, as merges read them, from every store."""

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest

from lora_core.sources import read
from registry.jobs.inputs import StoredFile
from registry.storage.source import StoredFiles
from tests.registry.storage.conftest import Lane, LocalLane
from tests.registry.storage.sample import Sample, make_sample

SPANS = 9 * 2**20 + 77  # more than two of the spans in which remote objects are read


@pytest.fixture
def sample(lane: Lane, tmp_path: Path) -> Sample:
    sample = make_sample(tmp_path, SPANS)
    lane.store.put(sample.key, sample.path, **sample.facts)
    return sample


def source_of(lane: Lane, sample: Sample) -> StoredFiles:
    return StoredFiles(lane.store, {"model": StoredFile("model", sample.key, sample.sha256, sample.size)})


def test_any_part_is_that_part(lane: Lane, sample: Sample) -> None:
    source = source_of(lane, sample)
    assert source.size("model") == SPANS
    assert source.size("absent") is None
    chance = random.Random(1)
    offsets = [0, 2**22 - 1, 2**22, SPANS - 1, *(chance.randrange(SPANS) for _ in range(20))]
    for offset in offsets:
        size = min(chance.randrange(5 * 2**20), SPANS - offset)
        assert read(source, "model", offset, size).tobytes() == sample.data[offset : offset + size]


def test_behind_the_end_is_nothing(lane: Lane, sample: Sample) -> None:
    with pytest.raises(ValueError, match="model has"):
        source_of(lane, sample).read_into("model", SPANS - 1, np.empty(2, np.uint8))


def test_files_are_closed_with_their_source(tmp_path: Path) -> None:
    lane = LocalLane(tmp_path)
    sample = make_sample(tmp_path)
    lane.store.put(sample.key, sample.path, **sample.facts)
    source = source_of(lane, sample)
    read(source, "model", 0, 1)
    held = open_files(sample.key)
    del source
    gc.collect()
    assert (held, open_files(sample.key)) == (1, 0)


def open_files(key: str) -> int:
    links = [path for path in Path("/proc/self/fd").iterdir() if os.path.islink(path)]
    return sum(os.readlink(path).endswith(key) for path in links if os.path.lexists(path))
