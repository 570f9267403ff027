"""Two things at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

T = TypeVar("T")


def race(*contestants: Callable[[], T]) -> list[T | Exception]:
    """Runs every function in its own thread, started together; what each returned or raised, in order."""
    start = Barrier(len(contestants))

    def run(contestant: Callable[[], T]) -> T | Exception:
        start.wait()
        try:
            return contestant()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(contestants)) as pool:
        return list(pool.map(run, contestants))
