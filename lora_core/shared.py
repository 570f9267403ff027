"""Values made once for all threads that ask at the same time, and kept while there is room."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class Shared(Generic[V]):
    """What `size` measures stays at or below `capacity`, but for the value that came last; the least used go first."""

    def __init__(self, capacity: int, size: Callable[[V], int] = lambda _value: 1) -> None:
        self._capacity, self._size = capacity, size
        self._held: OrderedDict[Hashable, Future[V]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, from `make` unless it is there or being made. An error reaches all who wait for it and
        is not kept."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                mine = self._held[key] = Future()
            else:
                self._held.move_to_end(key)
        if found is not None:
            return found.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._held[key]
            mine.set_exception(error)
            raise
        with self._lock:
            mine.set_result(value)
            self._used += self._size(value)
            self._make_room(key)
        return value

    def _make_room(self, newest: Hashable) -> None:
        """The one to go is mostly the first: a look at all of them each time cost more than what they hold."""
        while self._used > self._capacity:
            least = next((key for key, held in self._held.items() if key != newest and held.done()), None)
            if least is None:
                return
            self._used -= self._size(self._held.pop(least).result())
