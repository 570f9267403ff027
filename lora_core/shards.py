"""A checkpoint on disk, one file or many, and a folder that appears all at once."""

import hashlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lora_core import strict_json
from lora_core.errors import BadBase
from lora_core.header import Header, TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What a checkpoint folder may hold besides weights, index and config.json; a merge copies it.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class ShardIndex:
    """Which shard holds which tensor; a checkpoint in one file is one shard."""

    headers: Mapping[str, Header]
    sharded: bool

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {tensor.name: tensor for header in self.headers.values() for tensor in header.tensors}


def open_checkpoint(directory: Path) -> ShardIndex:
    """The index of the checkpoint in `directory`, from headers alone. Missing or surplus shards are BadBase."""
    index_path = directory / INDEX_FILE
    names = shard_names(index_path.read_bytes()) if index_path.is_file() else [SINGLE_FILE]
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise BadBase(f"the checkpoint lacks {', '.join(missing)}")
    headers = {name: read_header(directory / name) for name in names}
    return index_shards(headers, index_path.read_bytes() if index_path.is_file() else None)


def shard_names(index: bytes) -> list[str]:
    """The shards that `model.safetensors.index.json` names, sorted."""
    names = sorted(set(_weight_map(index).values()))
    if bad := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
        raise BadBase(f"{INDEX_FILE} names {bad[0][:80]!r}, which is not a plain *.safetensors file name")
    return names


def index_shards(headers: Mapping[str, Header], index: bytes | None) -> ShardIndex:
    """Headers checked against the index document: each tensor in exactly the shard that the index says."""
    found: dict[str, str] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if tensor.name in found:
                raise BadBase(f"{tensor.name} is in both {found[tensor.name]} and {shard}")
            found[tensor.name] = shard
    if index is None:
        if list(headers) != [SINGLE_FILE]:
            raise BadBase(f"without {INDEX_FILE} there must be one {SINGLE_FILE}")
    elif wrong := sorted(set(found.items()) ^ set(_weight_map(index).items())):
        raise BadBase(f"{INDEX_FILE} and the shards disagree about {wrong[0][0]}")
    return ShardIndex(dict(sorted(headers.items())), sharded=index is not None)


def _weight_map(index: bytes) -> dict[str, str]:
    try:
        document = strict_json.loads(index)
    except ValueError as error:
        raise BadBase(f"{INDEX_FILE} is {error}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadBase(f"{INDEX_FILE} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise BadBase(f"the weight_map of {INDEX_FILE} must map names to names")
    return weight_map


class ByteReader:
    """Positioned reads of one file; threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> np.ndarray[Any, Any]:
        """`size` bytes from `offset`, as a fresh uint8 array. A file that became shorter is an OSError."""
        buffer = np.empty(size, np.uint8)
        self.read_into(offset, buffer)
        return buffer

    def read_into(self, offset: int, buffer: np.ndarray[Any, Any]) -> None:
        """Fill the uint8 array with the bytes from `offset` on."""
        view = buffer.data
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise OSError(f"{self._path.name} became shorter while it was read")
            view, offset = view[count:], offset + count

    def copy(self, offset: int, size: int, descriptor: int, target: int) -> None:
        """`size` bytes from `offset` to byte `target` of another open file, inside the kernel where it can do that."""
        while size:
            count = self._copy_some(offset, size, descriptor, target)
            offset, target, size = offset + count, target + count, size - count

    def _copy_some(self, offset: int, size: int, descriptor: int, target: int) -> int:
        if sys.platform == "linux":
            with suppress(OSError):  # not between every two file systems
                if count := os.copy_file_range(self._descriptor, descriptor, size, offset, target):
                    return count
        return os.pwrite(descriptor, self.read(offset, min(size, 2**20)).data, target)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class HashingWriter:
    """A new file, hashed as it is written; `sha256` and `size` hold once it is closed, and it is on disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) :]

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    After a crash there is no `target`; what may stay behind is named `.<target>.<random>.partial`.
    """
    if target.exists():
        raise FileExistsError(f"{target.name} exists already")
    stage = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    stage.mkdir()
    try:
        yield stage
        _sync_directory(stage)
        stage.rename(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
