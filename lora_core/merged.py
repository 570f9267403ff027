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

from lora_core.errors import BadAdapter, BadRecipe, NonFinite
from lora_core.floats import Array, Scratch, Sums, compare, widen
from lora_core.gate import WEIGHTS_FILE
from lora_core.header import ADAPTER_HEADER_BYTES, ITEM_BYTES
from lora_core.layout import Computed, Copied, Literal, Output, OutputFile, lay_out
from lora_core.recipe import Recipe, TensorRecipe
from lora_core.sources import ByteSource, read, read_header
from lora_core.updates import AdapterReader, Update, load_update

_COPY_BYTES = 2**20
_UPDATES_HELD = 8
# What rounding did to a tensor is measured on runs of so many rows, or numbers, evenly spread over it: about so many
# numbers of it in all, or all of fewer.
_RUN_ROWS, _RUN_ITEMS, _MEASURED_ITEMS = 4, 2**13, 2**15


@dataclass(frozen=True)
class Block:
    """Bytes of an output file from `begin` on, and the sums over those of its rows that are measured, if asked for."""

    begin: int
    data: Array
    sums: Sums


class MergedCheckpoint:
    """`files` by name; `read` gives their bytes. Threads may share it. Memory: a few blocks per thread, the factors
    of a few tensors, and the headers.

    `dtype` is safetensors' name of one for all float tensors. `scale` multiplies the low-rank terms; a recipe that
    does anything else to a tensor is BadRecipe then. `shard_size` is in bytes of tensors; None keeps the base's shards.
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

    def block(self, piece: Computed, number: int) -> Array:
        """The bytes of one block of a tensor, for a reader: they are not written to."""
        return self.compute(piece, number).data

    def _part(self, piece: Computed, number: int, first: int, last: int) -> Array:
        begin = piece.begin + number * block_bytes(piece.output)
        return self.block(piece, number)[max(first - begin, 0) : last - begin]

    def compute(self, piece: Computed, number: int, out: Array | None = None, *, statistics: bool = False) -> Block:
        """One block of a tensor, in the first bytes of `out` (uint8) or in new ones; with what rounding did to its
        change, if asked. NaN and infinity are NonFinite."""
        output = piece.output
        first = number * output.block_rows
        rows = min(output.block_rows, output.rows - first)
        items = rows * output.columns
        size = items * ITEM_BYTES[output.dtype]
        data = np.empty(size, np.uint8) if out is None else out[:size]
        scratch = self._scratch(items)
        values, raw = scratch.values[:items], None
        if output.source is not None:
            raw = scratch.buffer(items * ITEM_BYTES[output.source.dtype])
            self._base.read_into(output.shard, output.row_offset(first), raw)
            scratch.widen(raw, output.source.dtype, values)
        matrix = values.reshape(rows, output.columns)
        if output.recipe and output.updated:
            self._updates.get(output, output.recipe).apply(matrix, first, scratch.product)
        if not scratch.narrow(values, output.dtype, data):
            message = f"{output.name} would hold NaN, infinity or a number too large for {output.dtype}"
            raise NonFinite(message, tensor=output.name)
        sums = _measure(output, first, raw, matrix, data) if statistics and output.updated else Sums()
        return Block(piece.begin + number * block_bytes(output), data, sums)

    def _scratch(self, items: int) -> Scratch:
        found: Scratch | None = getattr(self._local, "scratch", None)
        if found is None or found.values.size < items:
            found = self._local.scratch = Scratch(items)
        return found


def blocks(piece: Computed, start: int, end: int) -> range:
    """The numbers of the blocks that hold bytes `start` to `end` of the file, which lie in the piece."""
    step = block_bytes(piece.output)
    return range((start - piece.begin) // step, -((piece.begin - end) // step))


def block_bytes(output: Output) -> int:
    """Of every block of the tensor but the last, which may have fewer."""
    return output.block_rows * output.columns * ITEM_BYTES[output.dtype]


def _measured(output: Output, first: int, count: int) -> Iterator[slice]:
    """Which of `count` rows from `first` on are measured: that depends on nothing but the tensor."""
    run = max(_RUN_ROWS, _RUN_ITEMS // output.columns)
    runs, wanted = -(-output.rows // run), max(_MEASURED_ITEMS // (run * output.columns), 1)
    every = -(-runs // wanted)
    for number in range(-(-(first // run) // every) * every, -(-(first + count) // run), every):
        yield slice(max(number * run - first, 0), min((number + 1) * run - first, count))


def _measure(output: Output, first: int, raw: Array | None, exact: Array, data: Array) -> Sums:
    """The sums over the measured rows of a block that starts at row `first`. Without a base there is no change."""
    sums = Sums()
    for rows in _measured(output, first, len(exact)):
        taken = exact[rows].reshape(-1)
        if raw is None or output.source is None:
            sums.items += taken.size
        else:
            before, after = (
                widen(part.reshape(len(exact), -1)[rows].reshape(-1), dtype)
                for part, dtype in ((raw, output.source.dtype), (data, output.dtype))
            )
            sums.add(compare(before, taken, after))
    return sums


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
            lazy = self._held.get(output.name)
            if lazy is None:
                lazy = self._held[output.name] = _Lazy()
                if len(self._held) > _UPDATES_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(output.name)
        if lazy.update is not None:
            return lazy.update
        with lazy.lock:
            if lazy.update is None:
                update = load_update(recipe, self._adapter)
                update.prepare(partial(self._rows, output))
                lazy.update = update
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
    for name, tensor in recipe.tensors.items():
        if tensor.replaced_by or tensor.new_rows or tensor.magnitude:
            raise BadRecipe(f"{name} is not only added to: of it there is no change times {scale:g}", tensor=name)
    tensors = {
        name: replace(tensor, terms=tuple(replace(term, scaling=term.scaling * scale) for term in tensor.terms))
        for name, tensor in recipe.tensors.items()
    }
    return replace(recipe, tensors=tensors)


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)
