"""Safetensors headers: a strict reader for files of strangers, and a writer with the library's own bytes.

The format: 8 bytes little-endian length N, N bytes of JSON padded with spaces, then the tensors without holes.
https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core import strict_json
from lora_core.errors import BadHeader

ADAPTER_HEADER_BYTES = 2**20
BASE_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8

# In the order of the Rust library's enum: its writer sorts by this, descending, then by name.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_ORDER = {dtype: position for position, dtype in enumerate(ITEM_BYTES)}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `begin` and `end` count from the first byte after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file in the order of their bytes; the data starts at byte `data_start`."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)


def header_length(prefix: bytes, *, max_bytes: int) -> int:
    """N, from the first 8 bytes of a file. Refuses N above `max_bytes` before anybody reads that much."""
    if len(prefix) < 8:
        raise BadHeader("the file is shorter than the 8 bytes every safetensors file starts with")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= max_bytes:
        raise BadHeader(f"the header claims {length} bytes; 2 to {max_bytes} are accepted")
    return length


def parse_header(data: bytes, *, file_bytes: int, max_tensors: int = MAX_TENSORS) -> Header:
    """The header in `data` (8 bytes of length and the JSON) of a file of `file_bytes` bytes.

    Every byte after the header must belong to exactly one tensor; otherwise the file is refused.
    """
    if not data[8:].startswith(b"{"):
        raise BadHeader("the header does not start with {")
    try:
        document = strict_json.loads(data[8:])
    except ValueError as error:
        raise BadHeader(f"the header is {error}") from None
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader("__metadata__ must map strings to strings")
    if len(document) > max_tensors:
        raise BadHeader(f"{len(document)} tensors are more than the {max_tensors} accepted")
    tensors = tuple(
        sorted((_entry(name, value) for name, value in document.items()), key=lambda t: (t.begin, t.end, t.name))
    )
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            raise BadHeader(f"{tensor.name} starts at byte {tensor.begin}, where {position} is free next")
        position = tensor.end
    if len(data) + position != file_bytes:
        raise BadHeader(f"the header describes {len(data) + position} bytes, the file has {file_bytes}")
    return Header(tensors, metadata, len(data))


def read_header(path: Path, *, max_bytes: int = BASE_HEADER_BYTES, max_tensors: int = MAX_TENSORS) -> Header:
    """The header of the file at `path`. Reads nothing else of it."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = header_length(prefix, max_bytes=max_bytes)
        body = file.read(length)
        if len(body) != length:
            raise BadHeader(f"{path.name} ends inside its header")
        try:
            return parse_header(prefix + body, file_bytes=path.stat().st_size, max_tensors=max_tensors)
        except BadHeader as error:
            raise BadHeader(f"{path.name}: {error.message}") from None


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Header bytes for (name, dtype, shape) tensors, byte for byte what safetensors writes for them.

    Returns the bytes and where each tensor goes. Metadata is sorted; the library's own order is random.
    """
    document: dict[str, Any] = {}
    if metadata:
        document["__metadata__"] = dict(sorted(metadata.items()))
    placed = []
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-_ORDER[t[1]], t[0].encode())):
        if name in document or not _NAME.fullmatch(name):
            raise BadHeader(f"{name[:80]!r} is not a tensor name, or occurs twice")
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        placed.append(TensorInfo(name, dtype, shape, position, end))
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, Header(tuple(placed), dict(metadata), 8 + len(text))


def _entry(name: str, value: Any) -> TensorInfo:
    if not _NAME.fullmatch(name) or ".." in name:
        raise BadHeader(f"{name[:80]!r} is not a tensor name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(f"{name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadHeader(f"{name} has the dtype {str(dtype)[:40]!r}; accepted are {', '.join(ITEM_BYTES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise BadHeader(f"{name} has a malformed shape or data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BadHeader(f"{name} has {end - begin} bytes, but its shape and dtype need another number")
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
