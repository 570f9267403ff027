"""Several merged checkpoints of one base, read at the same time: what they all need of the base is read once."""

import itertools
import threading
from collections import deque
from collections.abc import Hashable
from functools import partial

import numpy as np

from lora_core.floats import Array
from lora_core.shared import Shared
from lora_core.sources import ByteSource, read

# Whoever alone asked for so many parts in a row is alone.
_REMEMBERED = 16


class SharedReads:
    """One base for many checkpoints: each takes a `reader` of its own.

    While there are several that read, a part that one has read is kept in `cache` for the others, and of those that
    want it at the same moment one reads it. Checkpoints of one base ask for the same parts: blocks lie on a grid that
    depends on the tensor alone. Who reads alone reads past the cache. `identity` tells bases in one cache apart; the
    capacity of the cache bounds what is kept of all of them.
    """

    def __init__(self, source: ByteSource, cache: Shared[Array], identity: Hashable) -> None:
        self._source, self._cache, self._identity = source, cache, identity
        self._numbers = itertools.count()
        self._recent: deque[int] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def reader(self) -> ByteSource:
        """The base for one checkpoint."""
        return _Reader(self, next(self._numbers))

    def size(self, path: str) -> int | None:
        return self._source.size(path)

    def read_into(self, reader: int, path: str, offset: int, buffer: Array) -> None:
        """What the reader with this number asks for."""
        with self._lock:
            self._recent.append(reader)
            alone = len(set(self._recent)) == 1
        if alone:
            self._source.read_into(path, offset, buffer)
        else:
            key = (self._identity, path, offset, buffer.size)
            np.copyto(buffer, self._cache.get(key, partial(read, self._source, path, offset, buffer.size)))


class _Reader:
    def __init__(self, shared: SharedReads, number: int) -> None:
        self._shared, self._number = shared, number

    def size(self, path: str) -> int | None:
        return self._shared.size(path)

    def read_into(self, path: str, offset: int, buffer: Array) -> None:
        self._shared.read_into(self._number, path, offset, buffer)
