"""Fold a LoRA into its base, to a folder: W + scaling · lora_B · lora_A and its variants, without torch.

Two threads read, compute and write; the caller's follows them and hashes, if digests are wanted. Memory is two blocks
and the factors of the modules at hand, whatever the model's size. The output appears at once or not at all.
"""

import hashlib
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_core.errors import DigestMismatch
from lora_core.floats import DTYPE_NAMES, Array, Sums
from lora_core.layout import Computed, Copied, OutputFile
from lora_core.merge_report import FileReport, MergeReport, tensor_report
from lora_core.merged import MergedCheckpoint, block_bytes, blocks
from lora_core.plan import plan_merge
from lora_core.recipe import Recipe
from lora_core.sources import LocalFiles, write_at
from lora_core.staging import Stage, resumable_directory

Dtype = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[int, int], None]

_THREADS = 2
_TASKS_IN_FLIGHT = 8
# Of one task, about: few enough to be stopped soon, enough to be worth the handing over.
_TASK_BYTES = 2**22
_HASH_BYTES = 2**18
# Of the arithmetic: what a killed process left of another number is not gone on with.
_FORMAT = 2


def merge(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    recipe: Recipe | None = None,
    dtype: Dtype | None = None,
    scale: float = 1.0,
    shard_size: int | None = None,
    digests: bool = False,
    expected: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> MergeReport:
    """Write the base with the adapter folded in to `out_dir`, which must not exist; its parent must.

    `dtype` converts every float tensor; None keeps each as it is, and then tensors the adapter does not touch keep
    their bytes. `scale` multiplies the change, `shard_size` (bytes) cuts new shards. Without a `recipe` one is made.
    With `digests` the report has the SHA-256 of every file. `expected` are those of files by name; another one is
    DigestMismatch. `on_progress(bytes done, bytes in all)` may raise to stop. NaN or infinity in a result is NonFinite.
    A killed merge goes on where it was, file by file.
    """
    if recipe is None:
        recipe = plan_merge(base_dir, adapter_dir).recipe
    target = DTYPE_NAMES[dtype] if dtype else None
    with LocalFiles(base_dir) as base, LocalFiles(adapter_dir) as adapter:
        merged = MergedCheckpoint(base, adapter, recipe, dtype=target, scale=scale, shard_size=shard_size)
        stamps, hashed = [base.stamps(), adapter.stamps()], digests or bool(expected)
        key = _key(recipe.to_json().decode(), target, scale, shard_size, hashed, stamps)
        with resumable_directory(out_dir, key) as stage:
            run = _Run(merged, base, stage, hashed=hashed, on_progress=on_progress)
            run.write_all()
            _check_digests(run.files, expected or {})
    outputs = (piece.output for file in merged.files.values() for piece in file.pieces if isinstance(piece, Computed))
    items = {output.name: math.prod(output.shape) for output in outputs}
    reports = [tensor_report(name, items[name], sums) for name, sums in run.sums.items()]
    count = sum(file.tensors for file in merged.files.values())
    return MergeReport(dtype or "base", reports, count - len(reports), run.files)


@dataclass
class _Open:
    """A file that is being written; of it so many bytes are, in order, and hashed if it has a `digest`."""

    path: str
    size: int
    descriptor: int
    digest: "hashlib._Hash | None"
    done: int = 0
    sums: dict[str, Sums] = field(default_factory=dict)


@dataclass(frozen=True)
class _Written:
    """The next `size` bytes of a file are in it."""

    size: int
    name: str | None = None
    sums: Sums | None = None


Task = Callable[[], _Written]


class _Run:
    """Writes files in order; the first parts of the next file are computed while the last of one are hashed."""

    def __init__(
        self,
        merged: MergedCheckpoint,
        base: LocalFiles,
        stage: Stage,
        *,
        hashed: bool,
        on_progress: Progress | None,
    ) -> None:
        self._merged, self._base, self._stage, self._on_progress = merged, base, stage, on_progress
        self._hashed = hashed
        self._total = sum(file.size for file in merged.files.values())
        self._done = 0
        self._buffer = bytearray(_HASH_BYTES if hashed else 0)
        self._local = threading.local()
        self._open: list[_Open] = []
        self._waiting: deque[tuple[_Open, Future[_Written]]] = deque()
        self.files: list[FileReport] = []
        self.sums: dict[str, Sums] = {}

    def write_all(self) -> None:
        pool = ThreadPoolExecutor(_THREADS, "merge")
        try:
            for path, file in self._merged.files.items():
                if (record := self._stage.finished(path, file.size)) is not None:
                    self._drain(0)
                    self._add(FileReport(path, file.size, record["sha256"]), record["sums"])
                    self._advance(file.size)
                else:
                    self._submit(pool, path, file)
            self._drain(0)
        finally:
            pool.shutdown(cancel_futures=True)
            for opened in self._open:
                os.close(opened.descriptor)

    def _submit(self, pool: ThreadPoolExecutor, path: str, file: OutputFile) -> None:
        descriptor = os.open(self._stage.files / path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        opened = _Open(path, file.size, descriptor, hashlib.sha256() if self._hashed else None)
        self._open.append(opened)
        _allocate(descriptor, file.size)
        for task in self._tasks(file, descriptor):
            self._waiting.append((opened, pool.submit(task)))
            self._drain(_TASKS_IN_FLIGHT)
        if not file.size:
            self._close(opened)

    def _tasks(self, file: OutputFile, descriptor: int) -> Iterator[Task]:
        for piece in file.pieces:
            if isinstance(piece, Computed):
                numbers = blocks(piece, piece.begin, piece.end)
                some = max(_TASK_BYTES // block_bytes(piece.output), 1)
                for first in range(0, len(numbers), some):
                    yield partial(self._compute, piece, numbers[first : first + some], descriptor)
            elif isinstance(piece, Copied):
                for begin in range(piece.begin, piece.end, _TASK_BYTES):
                    yield partial(self._copy, piece, begin, min(_TASK_BYTES, piece.end - begin), descriptor)
            else:
                yield partial(_write, piece.data, piece.begin, descriptor)

    def _compute(self, piece: Computed, numbers: range, descriptor: int) -> _Written:
        size, sums, buffer = 0, Sums(), self._block_buffer(block_bytes(piece.output))
        for number in numbers:
            block = self._merged.compute(piece, number, buffer, statistics=True)
            write_at(descriptor, block.data.data, block.begin)
            sums.add(block.sums)
            size += block.data.size
        return _Written(size, piece.output.name, sums) if piece.output.updated else _Written(size)

    def _block_buffer(self, size: int) -> Array:
        found: Array | None = getattr(self._local, "buffer", None)
        if found is None or found.size < size:
            found = self._local.buffer = np.empty(size, np.uint8)
        return found

    def _copy(self, piece: Copied, begin: int, size: int, descriptor: int) -> _Written:
        self._base.copy(piece.path, piece.offset + begin - piece.begin, size, descriptor, begin)
        return _Written(size)

    def _drain(self, left: int) -> None:
        """Take note of what was written, in order, until no more than `left` tasks are waited for."""
        while len(self._waiting) > left:
            opened, future = self._waiting.popleft()
            written = future.result()
            if opened.digest is not None:
                self._hash(opened.digest, opened.descriptor, opened.done, opened.done + written.size)
            if written.name is not None and written.sums is not None:
                opened.sums.setdefault(written.name, Sums()).add(written.sums)
            opened.done += written.size
            if opened.done == opened.size:
                self._close(opened)
            self._advance(written.size)

    def _hash(self, digest: "hashlib._Hash", descriptor: int, begin: int, end: int) -> None:
        """Of the bytes as the file system gives them back."""
        while begin < end:
            count = os.preadv(descriptor, [memoryview(self._buffer)[: end - begin]], begin)
            digest.update(memoryview(self._buffer)[:count])
            begin += count

    def _close(self, opened: _Open) -> None:
        os.close(opened.descriptor)
        self._open.remove(opened)
        sums = {name: asdict(value) for name, value in opened.sums.items()}
        sha256 = opened.digest.hexdigest() if opened.digest else ""
        self._stage.finish(opened.path, {"sha256": sha256, "sums": sums})
        self._add(FileReport(opened.path, opened.size, sha256), sums)

    def _add(self, report: FileReport, sums: Mapping[str, Mapping[str, Any]]) -> None:
        self.files.append(report)
        self.sums |= {name: Sums(**value) for name, value in sums.items()}

    def _advance(self, size: int) -> None:
        self._done += size
        if self._on_progress:
            self._on_progress(self._done, self._total)


def _allocate(descriptor: int, size: int) -> None:
    """Blocks reserved at once are a third cheaper to write than blocks found one by one."""
    os.ftruncate(descriptor, size)
    if size and sys.platform == "linux":
        with suppress(OSError):  # a file system that cannot
            os.posix_fallocate(descriptor, 0, size)


def _write(data: bytes, begin: int, descriptor: int) -> _Written:
    write_at(descriptor, memoryview(data), begin)
    return _Written(len(data))


def _key(*parts: object) -> str:
    """Of everything the output depends on; of files that are there, only by their size and time."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()


def _check_digests(files: list[FileReport], expected: Mapping[str, str]) -> None:
    found = {file.path: file.sha256 for file in files}
    if wrong := sorted(path for path, digest in expected.items() if found.get(path) != digest):
        raise DigestMismatch(f"{wrong[0]} is not what it should be: base or adapter differ", paths=wrong)
