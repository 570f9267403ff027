"""Where bytes of a base or an adapter come from: a folder here, an object store elsewhere."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from lora_core.errors import BadBase, BadHeader
from lora_core.floats import Array
from lora_core.header import Header, header_length, parse_header
from lora_core.shards import ByteReader


class ByteSource(Protocol):
    """Files by name, of which any part can be read. Threads share it; its files do not change."""

    def size(self, path: str) -> int | None:
        """Bytes of the file; None if there is no such file."""

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        """Fill the uint8 array with the bytes of the file from `offset` on."""


class LocalFiles:
    """The files of one folder. Each stays open until `close`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._readers: dict[str, ByteReader] = {}
        self._lock = threading.Lock()

    def size(self, path: str) -> int | None:
        file = self._directory / path
        return file.stat().st_size if file.is_file() else None

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        self._open(path).read_into(offset, buffer)

    def copy(self, path: str, offset: int, size: int, descriptor: int, target: int) -> None:
        """`size` bytes from `offset` to byte `target` of the open file, inside the kernel where it can do that."""
        self._open(path).copy(offset, size, descriptor, target)

    def stamps(self) -> list[list[Any]]:
        """Other after a file was written to, replaced, added or taken away."""
        entries = sorted((entry for entry in os.scandir(self._directory) if entry.is_file()), key=lambda e: e.name)
        return [[e.name, (status := e.stat()).st_size, status.st_mtime_ns, status.st_ino] for e in entries]

    def _open(self, path: str) -> ByteReader:
        with self._lock:
            if path not in self._readers:
                self._readers[path] = ByteReader(self._directory / path)
            return self._readers[path]

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read(source: ByteSource, path: str, offset: int, size: int) -> Array:
    """Exactly `size` bytes from `offset`, as a fresh uint8 array."""
    buffer = np.empty(size, np.uint8)
    source.read_into(path, offset, buffer)
    return buffer


def read_all(source: ByteSource, path: str, *, limit: int) -> bytes | None:
    """The whole file, if there is one; a file above `limit` bytes is BadBase."""
    size = source.size(path)
    if size is None:
        return None
    if size > limit:
        raise BadBase(f"{path} has {size} bytes; {limit} are accepted")
    return read(source, path, 0, size).tobytes()


def read_header(source: ByteSource, path: str, *, max_bytes: int) -> Header | None:
    """The safetensors header of the file, if there is one."""
    size = source.size(path)
    if size is None:
        return None
    prefix = read(source, path, 0, min(8, size)).tobytes()
    length = header_length(prefix, max_bytes=min(max_bytes, max(size - 8, 0)))
    try:
        return parse_header(read(source, path, 0, 8 + length).tobytes(), file_bytes=size)
    except BadHeader as error:
        raise BadHeader(f"{path}: {error.message}") from None


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at byte `offset` of the open file."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
