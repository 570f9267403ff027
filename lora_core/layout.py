"""Which bytes of which output file come from where: known from headers, before any arithmetic."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lora_core import strict_json
from lora_core.errors import BadBase, BadRecipe
from lora_core.floats import FLOATS
from lora_core.header import BASE_HEADER_BYTES, ITEM_BYTES, Header, TensorInfo, encode_header
from lora_core.recipe import Recipe, TensorRecipe
from lora_core.shards import COMPANION_FILES, INDEX_FILE, SINGLE_FILE, ShardIndex, index_shards, shard_names
from lora_core.sources import ByteSource, read_all, read_header

CONFIG_FILE = "config.json"
_DOCUMENT_BYTES = 64 * 2**20
# Twenty calls of numpy per block, and two threads that hand the interpreter to each other at each: smaller blocks cost
# more in waiting than they save in cache misses.
BLOCK_ITEMS = 262_144
# Fewer rows make the product slow; but not more than so many numbers, however wide the matrix.
_MIN_ROWS, _MAX_ITEMS = 16, 2**20


@dataclass(frozen=True)
class Output:
    """One tensor to write, from a tensor of the base in `shard` at byte `offset`, or without one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    recipe: TensorRecipe | None
    source: TensorInfo | None
    shard: str
    offset: int

    @cached_property
    def columns(self) -> int:
        return self.recipe.columns if self.recipe else 1

    @cached_property
    def rows(self) -> int:
        return math.prod(self.shape) // self.columns

    @property
    def updated(self) -> bool:
        """Whether the adapter says what numbers it holds."""
        return self.recipe is not None and not self.recipe.is_copy

    @property
    def copied(self) -> bool:
        """Whether its bytes are those of its source."""
        return not self.updated and self.source is not None and self.source.dtype == self.dtype

    @cached_property
    def block_rows(self) -> int:
        """Blocks start at multiples of so many rows, whoever reads which bytes."""
        rows = min(_MIN_ROWS, _MAX_ITEMS // self.columns)
        return max(BLOCK_ITEMS // self.columns, rows, 1)

    def row_offset(self, row: int) -> int:
        """Where the row starts in the shard of its source."""
        return self.offset + row * self.columns * ITEM_BYTES[self.source.dtype] if self.source else 0


@dataclass(frozen=True)
class Literal:
    """Bytes `begin` to `end` of an output file, as they are here."""

    begin: int
    end: int
    data: bytes


@dataclass(frozen=True)
class Copied:
    """Bytes of an output file that are those of a file of the base, from `offset` on."""

    begin: int
    end: int
    path: str
    offset: int


@dataclass(frozen=True)
class Computed:
    """Bytes of an output file that hold a tensor to compute."""

    begin: int
    end: int
    output: Output


Piece = Literal | Copied | Computed


@dataclass(frozen=True)
class OutputFile:
    """A file of the merged checkpoint, with so many tensors; the pieces cover it in order, without holes."""

    size: int
    pieces: tuple[Piece, ...]
    tensors: int = 0


def lay_out(base: ByteSource, recipe: Recipe, *, dtype: str | None, shard_size: int | None) -> dict[str, OutputFile]:
    """Every file of the merged checkpoint by name. `dtype` is safetensors' name, for every float tensor.

    Shards are those of the base, or filled up to `shard_size` bytes of tensors in the order of the base.
    """
    index = read_index(base)
    shards = _outputs(index, recipe, dtype)
    sharded = index.sharded
    if shard_size is not None:
        shards = _reshard([output for outputs in shards.values() for output in outputs], shard_size)
        sharded = len(shards) > 1
    metadata = next(iter(index.headers.values())).metadata
    files: dict[str, OutputFile] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for shard, outputs in shards.items():
        old = index.headers.get(shard) if shard_size is None else None
        files[shard] = _weights_file(shard, outputs, old, old.metadata if old else metadata)
        weight_map |= {output.name: shard for output in outputs}
        total += sum(_bytes(output) for output in outputs)
    files[CONFIG_FILE] = _config(base, recipe.config_changes, dtype)
    if sharded:
        files[INDEX_FILE] = _literal(_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    for name in COMPANION_FILES:
        if (size := base.size(name)) is not None:
            files[name] = OutputFile(size, (Copied(0, size, name, 0),))
    return files


def read_index(base: ByteSource) -> ShardIndex:
    """The shards of the base, from its index and headers alone. What is missing is BadBase."""
    document = read_all(base, INDEX_FILE, limit=_DOCUMENT_BYTES)
    names = shard_names(document) if document is not None else [SINGLE_FILE]
    return index_shards({name: _header(base, name) for name in names}, document)


def _header(base: ByteSource, path: str) -> Header:
    header = read_header(base, path, max_bytes=BASE_HEADER_BYTES)
    if header is None:
        raise BadBase(f"the checkpoint lacks {path}")
    return header


def _outputs(index: ShardIndex, recipe: Recipe, target: str | None) -> dict[str, list[Output]]:
    """By shard of the base: its own tensors in the order of their bytes, then what the recipe adds."""
    sources = {t.name: (t, shard, header.data_start) for shard, header in index.headers.items() for t in header.tensors}
    shards: dict[str, list[Output]] = {shard: [] for shard in index.headers}
    last = next(reversed(shards))
    for name in [*sources, *sorted(recipe.tensors.keys() - sources.keys())]:
        tensor = recipe.tensors.get(name)
        origin = tensor.base if tensor else name
        if origin is not None and origin not in sources:
            raise BadRecipe(f"the recipe needs {origin}, which the base lacks")
        source, shard, start = sources[origin] if origin is not None else (None, sources.get(name, (0, last))[1], 0)
        own = sources[name][1] if name in sources else shard
        dtype, shape = (tensor.dtype, tensor.shape) if tensor else (sources[name][0].dtype, sources[name][0].shape)
        if target and dtype in FLOATS:
            dtype = target
        output = Output(name, dtype, shape, tensor, source, shard, start + source.begin if source else 0)
        _check(output)
        shards[own].append(output)
    return shards


def _check(output: Output) -> None:
    recipe, source = output.recipe, output.source
    if recipe is None:
        return
    items = math.prod(output.shape)
    if output.dtype not in ITEM_BYTES or recipe.columns < 1 or items % recipe.columns:
        raise BadRecipe(f"{output.name} of the recipe is not a matrix of numbers")
    if source is not None and math.prod(source.shape) != items:
        raise BadRecipe(f"{output.name} of the recipe and {source.name} of the base differ in size")
    if not output.copied and not {output.dtype, source.dtype if source else output.dtype} <= FLOATS:
        raise BadRecipe(f"{output.name} is not a float and cannot be changed")


def _reshard(outputs: Iterable[Output], limit: int) -> dict[str, list[Output]]:
    if limit < 1:
        raise ValueError("shard_size must be at least one byte")
    shards: list[list[Output]] = []
    room = 0
    for output in outputs:
        size = _bytes(output)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(output)
        room -= size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _weights_file(path: str, outputs: list[Output], old: Header | None, metadata: Mapping[str, str]) -> OutputFile:
    """A file of `outputs`. Where it describes the same tensors as `old`, it starts with the base's own bytes."""
    by_name = {output.name: output for output in outputs}
    if old and [(t.name, t.dtype, t.shape) for t in old.tensors] == [(o.name, o.dtype, o.shape) for o in outputs]:
        header: Header = old
        pieces: list[Piece] = [Copied(0, old.data_start, path, 0)]
    else:
        head, header = encode_header([(o.name, o.dtype, o.shape) for o in outputs], metadata)
        pieces = [Literal(0, len(head), head)]
    for tensor in header.tensors:
        begin, end = header.data_start + tensor.begin, header.data_start + tensor.end
        output = by_name[tensor.name]
        if begin == end:
            continue
        if not output.copied:
            pieces.append(Computed(begin, end, output))
        elif _continues(pieces[-1], output):
            pieces[-1] = replace(pieces[-1], end=end)
        else:
            pieces.append(Copied(begin, end, output.shard, output.offset))
    return OutputFile(header.file_bytes, tuple(pieces), len(outputs))


def _continues(piece: Piece, output: Output) -> bool:
    """Whether the bytes of `output` follow those of `piece` in the base too."""
    if not isinstance(piece, Copied) or piece.path != output.shard:
        return False
    return piece.offset + piece.end - piece.begin == output.offset


def _config(base: ByteSource, changes: Mapping[str, Any], dtype: str | None) -> OutputFile:
    data = read_all(base, CONFIG_FILE, limit=_DOCUMENT_BYTES)
    if data is None:
        raise BadBase(f"the checkpoint lacks {CONFIG_FILE}")
    if not changes and dtype is None:
        return OutputFile(len(data), (Copied(0, len(data), CONFIG_FILE, 0),))
    try:
        document = strict_json.loads(data)
    except ValueError as error:
        raise BadBase(f"{CONFIG_FILE} is {error}") from None
    if not isinstance(document, dict):
        raise BadBase(f"{CONFIG_FILE} is not an object")
    if dtype is not None:
        document.pop("torch_dtype", None)  # the field's name before transformers 5
        document["dtype"] = dtype_name(dtype)
    return _literal(_json(document | dict(changes)))


def dtype_name(dtype: str) -> str:
    """safetensors' name → torch's."""
    return {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]


def _bytes(output: Output) -> int:
    return math.prod(output.shape) * ITEM_BYTES[output.dtype]


def _literal(data: bytes) -> OutputFile:
    return OutputFile(len(data), (Literal(0, len(data), data),))


def _json(document: object) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
