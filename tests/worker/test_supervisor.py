"""One child, watched closely: how it is stopped, and how much of it is kept."""

import json
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worker import fake_child
from tests.worker.depot import wait_until
from worker.attempt import Attempt, Stop
from worker.child_env import child_env
from worker.errors import Drained, JobFailed
from worker.process import LOG_BYTES, Child
from worker.protocol import EXIT_STOPPED, CheckpointNews, ErrorMessage, ResultMessage
from worker.supervisor import Ending, Patience, result_of, run_child

NEVER = 3600.0


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(job_id=uuid.uuid4(), tenant_id=uuid.uuid4(), fence=1)


@pytest.fixture
def told() -> list[CheckpointNews]:
    """What a child told about checkpoints."""
    return []


@pytest.fixture
def start(attempt: Attempt, tmp_path: Path, told: list[CheckpointNews]) -> Callable[..., Ending]:
    """Run the stand-in child; `meanwhile` is called, and `stall_seconds` count, once it has told its first step: how
    long a busy machine takes to start it does not matter."""

    def run(
        mode: int, meanwhile: Callable[[], None] = lambda: None, stall_seconds: float = NEVER, **over: float
    ) -> Ending:
        (tmp_path / "task.json").write_text(json.dumps({"spec": {"seed": mode}}))
        (tmp_path / "adapter").mkdir()
        argv = [sys.executable, str(Path(fake_child.__file__)), str(tmp_path / "adapter")]
        (tmp_path / "home").mkdir()

        def watch() -> None:
            wait_until(lambda: (attempt.news.take()[0] or {}).get("step"))
            object.__setattr__(patience, "stall_seconds", stall_seconds)
            meanwhile()

        waits = {"grace_seconds": NEVER, "stall_seconds": NEVER, "detached_seconds": NEVER}
        patience = Patience(**{**waits, **over})
        watcher = threading.Thread(target=watch)
        watcher.start()
        child = Child(argv, env=child_env(tmp_path / "home", threads=1), directory=tmp_path / "home")
        ending = run_child(child, tmp_path, attempt=attempt, patience=patience, on_checkpoint=told.append)
        watcher.join()
        return ending

    return run


def test_a_request_to_stop_is_enough_for_a_child_that_listens(start: Callable[..., Ending], attempt: Attempt) -> None:
    ending = start(fake_child.LONG, lambda: attempt.stop(Stop.DRAIN))
    assert ending.returncode == EXIT_STOPPED


def test_a_child_that_does_not_listen_is_killed_after_the_grace(start: Callable[..., Ending], attempt: Attempt) -> None:
    ending = start(fake_child.DEAF, lambda: attempt.stop(Stop.CANCEL), grace_seconds=0.1)
    assert ending.returncode == -signal.SIGKILL


def test_a_lost_fence_kills_without_grace(start: Callable[..., Ending], attempt: Attempt) -> None:
    ending = start(fake_child.DEAF, lambda: attempt.stop(Stop.LOST), grace_seconds=NEVER)
    assert ending.returncode == -signal.SIGKILL


def test_a_child_that_falls_silent_leaves_its_stacks_and_is_killed(start: Callable[..., Ending]) -> None:
    ending = start(fake_child.STUCK, stall_seconds=0.2)
    assert (ending.returncode, ending.stalled) == (-signal.SIGKILL, True)
    assert "most recent call first" in ending.log_tail and "fake_child.py" in ending.log_tail


def test_a_child_that_goes_on_is_not_silent(start: Callable[..., Ending], attempt: Attempt) -> None:
    def wait() -> None:
        time.sleep(6.5)
        attempt.stop(Stop.CANCEL)

    ending = start(fake_child.LONG, wait, stall_seconds=5)
    assert (ending.returncode, ending.stalled) == (EXIT_STOPPED, False)


def test_without_postgres_for_too_long_a_child_saves_and_stops(start: Callable[..., Ending], attempt: Attempt) -> None:
    def lose_postgres() -> None:
        attempt._renewed -= 2 * NEVER

    ending = start(fake_child.LONG, lose_postgres, detached_seconds=NEVER)
    assert ending.returncode == EXIT_STOPPED
    assert attempt.reason is Stop.DETACHED
    with pytest.raises(Drained):
        attempt.check()


def test_a_worker_that_hears_from_postgres_is_not_detached(attempt: Attempt) -> None:
    attempt._renewed -= NEVER
    assert attempt.detached_seconds() > NEVER
    attempt.trust(0.0)
    assert attempt.detached_seconds() < NEVER


def test_the_log_is_cut_and_its_writer_is_not_blocked(start: Callable[..., Ending], tmp_path: Path) -> None:
    ending = start(fake_child.LOUD)
    assert ending.returncode == 0
    assert (tmp_path / "log.txt").stat().st_size == LOG_BYTES
    assert set(ending.log_tail) == {"z"}


@pytest.mark.parametrize(
    ("ending", "error_class", "code"),
    [
        (Ending(0, None, ""), "bug", "trainer_crashed"),
        (Ending(1, ResultMessage(), ""), "bug", "trainer_crashed"),
        (Ending(1, ErrorMessage(error_class="oom", code="out_of_memory", message="x"), ""), "oom", "out_of_memory"),
        (Ending(0, ErrorMessage(error_class="user", code="bad_config", message="x"), ""), "bug", "trainer_crashed"),
        (Ending(-9, ResultMessage(), ""), "infra", "trainer_killed"),
        (Ending(-9, None, "", oom_killed=True), "host_oom", "host_out_of_memory"),
        (Ending(-9, None, "", stalled=True), "infra", "stalled"),
        (Ending(-7, None, ""), "infra", "machine_fault"),
        (Ending(-6, None, ""), "native_crash", "trainer_crashed"),
        (Ending(None, None, ""), "bug", "trainer_crashed"),
        (Ending(-11, None, ""), "native_crash", "trainer_crashed"),
        (Ending(EXIT_STOPPED, None, ""), "infra", "trainer_stopped"),
    ],
)
def test_only_exit_0_with_a_result_is_a_success(ending: Ending, error_class: str, code: str) -> None:
    with pytest.raises(JobFailed) as caught:
        result_of(ending)
    assert (caught.value.error_class, caught.value.code) == (error_class, code)
