"""Work that its caller need not wait for to the end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def run_apart(call: Callable[[], T], name: str) -> Future[T]:
    """What `call` returns or raises, in a thread of its own; unlike a pool's, it does not hold up the process's end."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # whoever asked decides
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer
