"""Fold a LoRA into its base: W + scaling · lora_B · lora_A, streamed shard by shard, without torch.

Each number is computed in float64 and rounded once, to the nearest of the output dtype. Memory is a few blocks
and the factors of the module at hand, whatever the size of the model. The output appears at once or not at all.
"""

import json
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from lora_core.errors import KeyMismatch, NonFinite
from lora_core.floats import DTYPE_NAMES, FLOATS, Array, Scratch, square_sum
from lora_core.gate import WEIGHTS_FILE
from lora_core.header import ITEM_BYTES, Header, TensorInfo, encode_header
from lora_core.plan import MergePlan, plan_merge
from lora_core.shards import COMPANION_FILES, INDEX_FILE, ByteReader, HashingWriter, staged_directory
from lora_core.updates import AdapterReader, Update, load_update

Dtype = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[int, int], None]
Layout = tuple[bytes, Header]

# A block's float64 values fill half a megabyte, so that every pass over them finds them in the L2 cache.
BLOCK_ITEMS = 65_536
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 16, 256
_THREADS = 2
_BLOCKS_IN_FLIGHT = 6


@dataclass(frozen=True)
class TensorReport:
    """One merged tensor. `relative_delta` = ‖ΔW‖/‖W‖; `rounding_loss` = ‖round(W+ΔW) − (W+ΔW)‖/‖ΔW‖."""

    name: str
    relative_delta: float
    rounding_loss: float


@dataclass(frozen=True)
class FileReport:
    """One output file."""

    path: str
    size: int
    sha256: str


@dataclass
class MergeReport:
    """What a merge did. `copied_tensors` counts those the adapter does not touch."""

    dtype: str
    tensors: list[TensorReport] = field(default_factory=list)
    copied_tensors: int = 0
    files: list[FileReport] = field(default_factory=list)


def merge(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    dtype: Dtype | None = None,
    on_progress: Progress | None = None,
) -> MergeReport:
    """Write the base with the adapter folded in to `out_dir`, which must not exist; its parent must.

    `dtype` converts every float tensor; None keeps each as it is, and then tensors the adapter does not touch keep
    their bytes. `on_progress(bytes done, bytes in all)` may raise to stop. NaN or infinity in a result is NonFinite.
    """
    plan = plan_merge(base_dir, adapter_dir)
    _check_supported(plan)
    layouts = _layouts(base_dir, plan, DTYPE_NAMES[dtype] if dtype else None)
    total = sum(header.file_bytes for _, header in layouts.values())
    report = MergeReport(dtype=dtype or "base")
    done = 0
    with staged_directory(out_dir) as stage, closing(_Merger(base_dir, adapter_dir, plan)) as merger:
        for shard, (head, header) in layouts.items():
            with HashingWriter(stage / shard) as writer:
                writer.write(head)
                for data in merger.blocks(shard, header):
                    writer.write(data)
                    if on_progress:
                        on_progress(done + writer.size, total)
            done += writer.size
            report.files.append(FileReport(shard, writer.size, writer.sha256))
        report.files += _write_companions(base_dir, stage, plan, layouts, dtype)
    report.tensors = merger.tensor_reports()
    report.copied_tensors = len(plan.index.tensors()) - len(report.tensors)
    return report


@dataclass
class _Sums:
    """Squared norms of one tensor, filled in as its blocks pass."""

    weight: float = 0.0
    delta: float = 0.0
    lost: float = 0.0


@dataclass(frozen=True)
class _Piece:
    """`size` source bytes from `offset`: rows `first` and on of a tensor that is updated, or any part of another."""

    before: TensorInfo
    after: TensorInfo
    offset: int
    size: int
    first: int
    columns: int
    update: Update | None


@dataclass(frozen=True)
class _Block:
    """Output bytes of one piece, and what it adds to the sums of its tensor."""

    name: str
    data: Array
    weight: float = 0.0
    delta: float = 0.0
    lost: float = 0.0


class _Merger:
    """Computes the bytes of shards in order; two threads work a few blocks ahead of whoever writes them."""

    def __init__(self, base_dir: Path, adapter_dir: Path, plan: MergePlan) -> None:
        self._base_dir = base_dir
        self._plan = plan
        self._weights = ByteReader(adapter_dir / WEIGHTS_FILE)
        self._adapter = AdapterReader(plan.adapter_header, self._weights.read)
        self._pool = ThreadPoolExecutor(_THREADS, "merge")
        self._local = threading.local()
        self._sums: dict[str, _Sums] = {}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._weights.close()

    def tensor_reports(self) -> list[TensorReport]:
        return [
            TensorReport(name, _ratio(sums.delta, sums.weight), _ratio(sums.lost, sums.delta))
            for name, sums in self._sums.items()
        ]

    def blocks(self, shard: str, header: Header) -> Iterator[Array]:
        """The data of one output shard, laid out as `header` says."""
        waiting: deque[Future[_Block]] = deque()
        with ByteReader(self._base_dir / shard) as source:
            for piece in self._pieces(self._plan.index.headers[shard], header):
                waiting.append(self._pool.submit(self._compute, source, piece))
                if len(waiting) > _BLOCKS_IN_FLIGHT:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())

    def _finish(self, future: Future[_Block]) -> Array:
        block = future.result()
        if sums := self._sums.get(block.name):
            sums.weight += block.weight
            sums.delta += block.delta
            sums.lost += block.lost
        return block.data

    def _pieces(self, old: Header, new: Header) -> Iterator[_Piece]:
        sources = {tensor.name: tensor for tensor in old.tensors}
        for after in new.tensors:
            before = sources[after.name]
            recipe = self._plan.recipe.tensors.get(after.name)
            update = load_update(recipe, self._adapter) if recipe else None
            if update:
                self._sums[after.name] = _Sums()
            columns = recipe.columns if recipe else 1
            rows = min(max(BLOCK_ITEMS // columns, MIN_BLOCK_ROWS), MAX_BLOCK_ROWS) if recipe else BLOCK_ITEMS
            step = rows * columns * ITEM_BYTES[before.dtype]
            for number, begin in enumerate(range(before.begin, before.end, step)):
                size = min(step, before.end - begin)
                yield _Piece(before, after, old.data_start + begin, size, number * rows, columns, update)

    def _compute(self, source: ByteReader, piece: _Piece) -> _Block:
        raw = source.read(piece.offset, piece.size)
        if piece.update is None and piece.before.dtype == piece.after.dtype:
            return _Block(piece.after.name, raw)
        items = piece.size // ITEM_BYTES[piece.before.dtype]
        scratch = self._scratch(items)
        values = scratch.widen(raw, piece.before.dtype, scratch.values)
        weight = delta = 0.0
        if piece.update:
            weight = square_sum(values)
            change = scratch.product[:items]
            np.negative(values, out=change)
            piece.update.apply(values.reshape(-1, piece.columns), piece.first)
            change += values
            delta = square_sum(change)
        data = scratch.narrow(values, piece.after.dtype)
        lost = scratch.rounding_loss(values, data, piece.after.dtype)
        if not math.isfinite(lost):
            name, dtype = piece.after.name, piece.after.dtype
            raise NonFinite(f"{name} would hold NaN, infinity or a number too large for {dtype}", tensor=name)
        return _Block(piece.after.name, data, weight, delta, lost)

    def _scratch(self, items: int) -> Scratch:
        found: Scratch | None = getattr(self._local, "scratch", None)
        if found is None or found.values.size < items:
            found = self._local.scratch = Scratch(items)
        return found


def _check_supported(plan: MergePlan) -> None:
    """Outputs are still laid out as the base is: no tensor more, none of another shape."""
    if "tie_word_embeddings" in plan.recipe.config_changes:
        raise KeyMismatch("the base ties its input and output layer, and the adapter makes them differ: unsupported")
    for name, tensor in plan.recipe.tensors.items():
        if tensor.base != name or tensor.magnitude_of_columns:
            raise KeyMismatch(f"{name} would be more than changed in place: unsupported")


def _layouts(base_dir: Path, plan: MergePlan, target: str | None) -> dict[str, Layout]:
    return {shard: _layout(base_dir / shard, header, target) for shard, header in plan.index.headers.items()}


def _layout(path: Path, header: Header, target: str | None) -> Layout:
    """Header bytes of an output shard and where its tensors go; the base's own bytes when no dtype changes."""
    dtypes = {t.name: target if target and t.dtype in FLOATS else t.dtype for t in header.tensors}
    if all(tensor.dtype == dtypes[tensor.name] for tensor in header.tensors):
        with ByteReader(path) as reader:
            return reader.read(0, header.data_start).tobytes(), header
    return encode_header([(t.name, dtypes[t.name], t.shape) for t in header.tensors], header.metadata)


def _write_companions(
    base_dir: Path, stage: Path, plan: MergePlan, layouts: Mapping[str, Layout], dtype: Dtype | None
) -> list[FileReport]:
    """config.json with its new dtype, the index with its new size, and the other files as they are."""
    config = (base_dir / "config.json").read_bytes()
    if dtype:
        document = json.loads(config)
        document.pop("torch_dtype", None)  # the field's name before transformers 5
        config = _json(document | {"dtype": dtype})
    written = [_write(stage / "config.json", config)]
    if plan.index.sharded:
        tensors = [(tensor, shard) for shard, (_, header) in layouts.items() for tensor in header.tensors]
        total = sum(tensor.end - tensor.begin for tensor, _ in tensors)
        weight_map = {tensor.name: shard for tensor, shard in tensors}
        index = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(_write(stage / INDEX_FILE, index))
    for name in COMPANION_FILES:
        if (base_dir / name).is_file():
            with (base_dir / name).open("rb") as source, HashingWriter(stage / name) as writer:
                shutil.copyfileobj(source, writer, 2**20)
            written.append(FileReport(name, writer.size, writer.sha256))
    return written


def _write(path: Path, data: bytes) -> FileReport:
    with HashingWriter(path) as writer:
        writer.write(data)
    return FileReport(path.name, writer.size, writer.sha256)


def _json(document: object) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _ratio(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator else 0.0
