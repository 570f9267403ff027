"""Several merged checkpoints of one base, read at the same time: what they all need of the base is read once."""

import weakref
from collections.abc import Hashable
from functools import partial

import numpy as np

from lora_core.floats import Array
from lora_core.shared import Shared
from lora_core.sources import ByteSource, read


class SharedReads:
    """One base for many checkpoints: each takes a `reader` of its own.

    While there are two readers or more, a part that one has read is kept in `cache` for the others, and of those that
    want it at the same moment one reads it. Checkpoints of one base ask for the same parts: blocks lie on a grid that
    depends on the tensor alone. A single reader reads past the cache. `identity` tells bases in one cache apart; the
    capacity of the cache bounds what is kept of all of them.
    """

    def __init__(self, source: ByteSource, cache: Shared[Array], identity: Hashable) -> None:
        self._source, self._cache, self._identity = source, cache, identity
        self._readers: weakref.WeakSet[_Reader] = weakref.WeakSet()

    def reader(self) -> ByteSource:
        """The base for one checkpoint; it counts until the checkpoint is gone."""
        reader = _Reader(self)
        self._readers.add(reader)
        return reader

    def size(self, path: str) -> int | None:
        return self._source.size(path)

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        if len(self._readers) < 2:
            self._source.read_into(path, offset, buffer)
            return
        key = (self._identity, path, offset, buffer.size)
        np.copyto(buffer, self._cache.get(key, partial(read, self._source, path, offset, buffer.size)))


class _Reader:
    def __init__(self, shared: SharedReads) -> None:
        self._shared = shared

    def size(self, path: str) -> int | None:
        return self._shared.size(path)

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        self._shared.read_into(path, offset, buffer)
