"""A merged checkpoint that need not exist: any bytes of any of its files, computed from base, adapter and recipe.

Each number is computed in float64 and rounded once, to the nearest of the output dtype. Blocks lie on a grid that
depends on nothing but the tensor, so the bytes are the same whoever reads which of them, and in what order."""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lora_core.errors import BadAdapter, NonFinite
from lora_core.floats import Array, Scratch, Sums, widen
from lora_core.gate import WEIGHTS_FILE
from lora_core.header import ADAPTER_HEADER_BYTES, ITEM_BYTES
from lora_core.layout import Computed, Copied, Literal, Output, OutputFile, lay_out
from lora_core.recipe import Recipe, TensorRecipe
from lora_core.sources import ByteSource, read, read_header
from lora_core.updates import AdapterReader, Update, load_update

_COPY_BYTES = 2**20
_UPDATES_HELD = 8


@dataclass(frozen=True)
class Block:
    """Bytes of an output file from `begin` on, and the sums of its numbers as far as they were asked for."""

    begin: int
    data: Array
    sums: Sums


class MergedCheckpoint:
    """`files` by name; `read` gives their bytes. Threads may share it. Memory: a few blocks per thread, the factors
    of a few tensors, and the headers.

    `dtype` is safetensors' name of one for all float tensors. `scale` multiplies the low-rank terms; what replaces
    numbers of the base stays as it is. `shard_size` is in bytes of tensors; None keeps the base's shards.
    """

    def __init__(
        self,
        base: ByteSource,
        adapter: ByteSource,
        recipe: Recipe,
        *,
        dtype: str | None = None,
        scale: float = 1.0,
        shard_size: int | None = None,
    ) -> None:
        self._base = base
        recipe = _scaled(recipe, scale)
        self.files: Mapping[str, OutputFile] = lay_out(base, recipe, dtype=dtype, shard_size=shard_size)
        self._updates = _Updates(base, _open_adapter(adapter))
        self._local = threading.local()

    def read(self, path: str, start: int, end: int) -> Iterator[Array]:
        """Bytes `start` to `end` of the file, in order, as uint8 arrays of at most some megabytes."""
        return (part() for part in self.parts(path, start, end))

    def parts(self, path: str, start: int, end: int) -> Iterator[Callable[[], Array]]:
        """What `read` yields, each part made when it is called: in any thread, in any order."""
        file = self.files[path]
        if not 0 <= start <= end <= file.size:
            raise ValueError(f"{path} has {file.size} bytes")
        for piece in file.pieces:
            first, last = max(start, piece.begin), min(end, piece.end)
            if first >= last:
                continue
            if isinstance(piece, Literal):
                yield partial(_bytes, piece.data[first - piece.begin : last - piece.begin])
            elif isinstance(piece, Copied):
                for begin in range(first, last, _COPY_BYTES):
                    size = min(_COPY_BYTES, last - begin)
                    yield partial(read, self._base, piece.path, piece.offset + begin - piece.begin, size)
            else:
                for number in blocks(piece, first, last):
                    yield partial(self._part, piece, number, first, last)

    def _part(self, piece: Computed, number: int, first: int, last: int) -> Array:
        block = self.compute(piece, number)
        return block.data[max(first - block.begin, 0) : last - block.begin]

    def compute(self, piece: Computed, number: int, *, statistics: bool = False) -> Block:
        """One block of a tensor; with what rounding did to its change, if asked. NaN and infinity are NonFinite."""
        output = piece.output
        first = number * output.block_rows
        rows = min(output.block_rows, math.prod(output.shape) // output.columns - first)
        scratch = self._scratch(rows * output.columns)
        values = scratch.values[: rows * output.columns]
        before = None
        if output.source is not None:
            raw = scratch.buffer(values.size * ITEM_BYTES[output.source.dtype])
            self._base.read_into(output.shard, output.row_offset(first), raw)
            scratch.widen(raw, output.source.dtype, values)
            before = raw, output.source.dtype
        if output.recipe and output.updated:
            self._updates.get(output, output.recipe).apply(values.reshape(rows, output.columns), first)
        data, sums = scratch.narrow(values, output.dtype, before if statistics and output.updated else None)
        if not math.isfinite(sums.lost):
            message = f"{output.name} would hold NaN, infinity or a number too large for {output.dtype}"
            raise NonFinite(message, tensor=output.name)
        return Block(piece.begin + first * output.columns * ITEM_BYTES[output.dtype], data, sums)

    def _scratch(self, items: int) -> Scratch:
        found: Scratch | None = getattr(self._local, "scratch", None)
        if found is None or found.values.size < items:
            found = self._local.scratch = Scratch(items)
        return found


def blocks(piece: Computed, start: int, end: int) -> range:
    """The numbers of the blocks that hold bytes `start` to `end` of the file, which lie in the piece."""
    step = piece.output.block_rows * piece.output.columns * ITEM_BYTES[piece.output.dtype]
    return range((start - piece.begin) // step, -((piece.begin - end) // step))


class _Lazy:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.update: Update | None = None


class _Updates:
    """The factors of the tensors used last; each is read once, by the first thread that asks."""

    def __init__(self, base: ByteSource, adapter: AdapterReader) -> None:
        self._base, self._adapter = base, adapter
        self._held: OrderedDict[str, _Lazy] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, output: Output, recipe: TensorRecipe) -> Update:
        with self._lock:
            lazy = self._held.setdefault(output.name, _Lazy())
            self._held.move_to_end(output.name)
            if len(self._held) > _UPDATES_HELD:
                self._held.popitem(last=False)
        with lazy.lock:
            if lazy.update is None:
                lazy.update = load_update(recipe, self._adapter)
                lazy.update.prepare(partial(self._rows, output))
            return lazy.update

    def _rows(self, output: Output, begin: int, end: int) -> Array:
        if output.source is None:
            return np.empty((end - begin, output.columns))
        size = (end - begin) * output.columns * ITEM_BYTES[output.source.dtype]
        raw = read(self._base, output.shard, output.row_offset(begin), size)
        return widen(raw, output.source.dtype).reshape(end - begin, output.columns)


def _open_adapter(adapter: ByteSource) -> AdapterReader:
    header = read_header(adapter, WEIGHTS_FILE, max_bytes=ADAPTER_HEADER_BYTES)
    if header is None:
        raise BadAdapter(f"the adapter lacks {WEIGHTS_FILE}")
    return AdapterReader(header, lambda offset, size: read(adapter, WEIGHTS_FILE, offset, size))


def _scaled(recipe: Recipe, scale: float) -> Recipe:
    if not math.isfinite(scale):
        raise ValueError("scale must be a number")
    if scale == 1:
        return recipe
    tensors = {
        name: replace(tensor, terms=tuple(replace(term, scaling=term.scaling * scale) for term in tensor.terms))
        for name, tensor in recipe.tensors.items()
    }
    return replace(recipe, tensors=tensors)


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)
