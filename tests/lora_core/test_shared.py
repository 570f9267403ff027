import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_core.shared import Shared


def test_a_value_is_made_once_for_all_who_ask_at_once() -> None:
    shared: Shared[int] = Shared(10)
    made, begun, go = [], threading.Event(), threading.Event()

    def make() -> int:
        begun.set()
        assert go.wait(120)
        made.append(1)
        return 7

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(shared.get, "key", make) for _ in range(4)]
        assert begun.wait(120)
        go.set()
        assert [answer.result(120) for answer in answers] == [7] * 4
    assert made == [1]


def test_the_least_used_goes_first_and_the_last_stays_however_large() -> None:
    shared: Shared[bytes] = Shared(100, len)

    def make(size: int) -> bytes:
        made.append(size)
        return bytes(size)

    made: list[int] = []
    for key, size in (("a", 40), ("b", 50), ("a", 40), ("c", 30)):  # c needs room; b was used longer ago than a
        shared.get(key, lambda size=size: make(size))
    assert made == [40, 50, 30]
    shared.get("a", lambda: make(1))
    assert made == [40, 50, 30]
    shared.get("b", lambda: make(1000))
    shared.get("b", lambda: make(1))
    shared.get("a", lambda: make(2))
    assert made == [40, 50, 30, 1000, 2]


def test_an_error_is_not_kept() -> None:
    shared: Shared[int] = Shared(10)

    def fail() -> int:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        shared.get("key", fail)
    assert shared.get("key", lambda: 3) == 3
