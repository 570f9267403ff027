"""Stored objects as the files of a folder, of which any part can be read: what a merge is computed from."""

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import numpy as np

from lora_core.floats import Array
from lora_core.shards import ByteReader
from lora_core.shared import Shared
from registry.errors import StorageUnavailable
from registry.storage.base import ObjectStore
from registry.storage.local import LocalStore

SPANS_HELD_BYTES = 2**25
_SPAN_BYTES = 2**22


class Stored(Protocol):
    """Where the bytes of one file lie, and how many there are."""

    @property
    def key(self) -> str: ...
    @property
    def size(self) -> int: ...


class StoredFiles:
    """lora_core's ByteSource over a store. Local objects are read in place, others in spans that readers share: those
    of this source, or all that are given the same `spans`."""

    def __init__(self, store: ObjectStore, files: Mapping[str, Stored], spans: Shared[bytes] | None = None) -> None:
        self._store, self._files = store, files
        self._readers: Shared[ByteReader] = Shared(len(files))
        self._spans = spans or Shared(SPANS_HELD_BYTES, len)

    def size(self, path: str) -> int | None:
        return self._files[path].size if path in self._files else None

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        file = self._files[path]
        if offset + buffer.size > file.size:
            raise ValueError(f"{path} has {file.size} bytes")
        if isinstance(self._store, LocalStore):
            self._reader(self._store, file.key).read_into(offset, buffer)
        else:
            self._read_spans(file, offset, buffer)

    def _reader(self, store: LocalStore, key: str) -> ByteReader:
        def open_object() -> ByteReader:
            reader = ByteReader(store.file(key))
            weakref.finalize(self, reader.close)  # whoever reads from it holds this source
            return reader

        return self._readers.get(key, open_object)

    def _read_spans(self, file: Stored, offset: int, buffer: Array) -> None:
        done = 0
        while done < buffer.size:
            number, first = divmod(offset + done, _SPAN_BYTES)
            span = self._spans.get((file.key, number), partial(self._fetch, file, number))
            part = np.frombuffer(span, np.uint8)[first : first + buffer.size - done]
            buffer[done : done + part.size] = part
            done += part.size

    def _fetch(self, file: Stored, number: int) -> bytes:
        begin, end = number * _SPAN_BYTES, min((number + 1) * _SPAN_BYTES, file.size)
        span = b"".join(self._store.open(file.key, start=begin, end=end))
        if len(span) != end - begin:
            raise StorageUnavailable("The object store sent less of an object than there is.")
        return span
