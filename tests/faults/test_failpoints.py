"""The failpoints themselves: what can be armed, and that a service that is not under test refuses them."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from registry import failpoints
from registry.errors import Unavailable
from registry.settings import Settings

SETTINGS = {
    "database_url": "postgresql+psycopg://nobody@/nothing",
    "store_url": "file:///nowhere",
    "secret_key": "s" * 40,
}


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_nothing_happens_where_nothing_is_armed() -> None:
    failpoints.arm("somewhere=raise")
    failpoints.hit("elsewhere")


def test_an_action_happens_at_every_hit_or_at_the_one_that_was_named() -> None:
    failpoints.arm("always=raise; second=raise@2")
    for _ in range(2):
        with pytest.raises(Unavailable):
            failpoints.hit("always")
    failpoints.hit("second")
    with pytest.raises(Unavailable):
        failpoints.hit("second")
    failpoints.hit("second")


@pytest.mark.parametrize("text", ["x", "x=", "=raise", "x=explode", "x=raise@0", "x=raise@", "x=sleep:", "x=kill9:1"])
def test_what_cannot_be_understood_is_refused_and_changes_nothing(text: str) -> None:
    failpoints.arm("armed=raise")
    with pytest.raises(ValueError):
        failpoints.arm(text)
    with pytest.raises(Unavailable):
        failpoints.hit("armed")


@pytest.mark.parametrize(("action", "status"), [("kill9", -signal.SIGKILL), ("exit", failpoints.EXIT_STATUS)])
def test_a_process_ends_where_it_was_told_to(action: str, status: int) -> None:
    code = (
        f"from registry import failpoints as f; f.arm('x={action}@2'); f.hit('x'); print('on', flush=True); f.hit('x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "on\n")


def test_only_tests_may_break_a_service() -> None:
    with pytest.raises(ValueError, match="for tests only"):
        Settings(**SETTINGS, failpoints="pub.hashed=kill9")
    assert Settings(**SETTINGS, failpoints="pub.hashed=kill9", testing=True).failpoints == "pub.hashed=kill9"
