"""Merged checkpoints of one base that are read together fetch it once, however little of it is kept."""

import hashlib
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lora_core.floats import Array
from lora_core.merge import merge
from registry import merged as service
from registry.jobs.inputs import BaseInput, StoredFile, VersionInput
from registry.jobs.spec import MergeOptions
from registry.merged import VirtualMerges
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from registry.storage.keys import blob_key
from tests.lora_core.adapters import make_peft_adapter
from tests.registry.storage.counting import CountingStore
from tests.tiny import make_base, randomize_adapter

SPAN = 2**22
OPTIONS = MergeOptions(dtype="bfloat16")  # every tensor is computed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of five spans, and four adapters of it."""
    root = tmp_path_factory.mktemp("merged")
    base = make_base(root / "base", hidden=128, vocab=19_000)
    for number in range(4):
        adapter = make_peft_adapter(base, root / f"adapter-{number}", r=4)
        (adapter / "README.md").unlink()
        randomize_adapter(adapter, seed=number)
    return {path.name: path for path in root.iterdir()}


def put(store: ObjectStore, folder: Path) -> tuple[StoredFile, ...]:
    files = []
    for path in sorted(folder.iterdir()):
        sha256, size = digest_file(path)
        files.append(StoredFile(path.name, blob_key(sha256, uuid.uuid4()), sha256, size))
        store.put(files[-1].key, path, sha256=sha256, size=size)
    return tuple(files)


def test_four_adapters_of_one_base_read_together_fetch_it_once(
    store: ObjectStore, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "SPANS_HELD_BYTES", 2 * SPAN)
    monkeypatch.setattr(service, "BLOCKS_HELD_BYTES", SPAN)
    counting = CountingStore(store)
    base = BaseInput("base", None, "b" * 64, put(store, folders["base"]))
    merges = VirtualMerges(counting)
    names = [name for name in folders if name != "base"]
    versions = [VersionInput(base, f"{name}@1", name, put(store, folders[name]), None) for name in names]
    checkpoints = [merges.open(version, OPTIONS) for version in versions]
    weights = next(file for file in base.files if file.path == "model.safetensors")
    assert weights.size > 4 * SPAN  # more than is kept
    counting.sent.clear()  # the first read of all compared every byte with its digest

    size = checkpoints[0].files["model.safetensors"].size
    readers = [checkpoint.parts("model.safetensors", 0, size) for checkpoint in checkpoints]
    digests = [hashlib.sha256() for _ in names]
    for parts in zip(*readers, strict=True):  # as readers that wait for their turn
        for digest, future in zip(digests, [merges.submit(part) for part in parts], strict=True):
            digest.update(future.result())
    assert counting.sent[weights.key] < 1.25 * weights.size
    merge(folders["base"], folders[names[3]], tmp_path / "out", dtype="bfloat16")
    assert digests[3].hexdigest() == digest_file(tmp_path / "out" / "model.safetensors")[0]
    assert len({digest.hexdigest() for digest in digests}) == 4
    merges.close()


def test_parts_are_computed_in_the_order_of_their_coming(store: ObjectStore) -> None:
    """So that readers who ask for a few at a time share the threads evenly."""
    merges = VirtualMerges(store)
    begun: list[int] = []

    def part(number: int) -> Array:
        begun.append(number)
        return np.full(1, number, np.uint8)

    futures = [merges.submit(partial(part, number)) for number in range(60)]
    assert [future.result()[0] for future in futures] == list(range(60))
    assert all(abs(place - number) < service.THREADS for place, number in enumerate(begun))
    merges.close()
