"""A worker shows that it goes on, and stops showing it when it does not."""

import os
from pathlib import Path

from tests.worker.conftest import StartWorker
from tests.worker.depot import Depot, wait_until
from worker.health import FRESH_SECONDS, is_fresh, pulse
from worker.host import Host
from worker.runner import Runner

NOW = 1_000_000.0


def pulse_at(path: Path, seconds: float) -> None:
    path.touch()
    os.utime(path, (seconds, seconds))


def test_a_fresh_pulse_of_this_host_counts(tmp_path: Path) -> None:
    assert not is_fresh(tmp_path, host="box", now=NOW)
    pulse_at(tmp_path / "other-1-abc.pulse", NOW)
    pulse_at(tmp_path / "box-1-abc.pulse", NOW - FRESH_SECONDS - 1)
    assert not is_fresh(tmp_path, host="box", now=NOW)
    pulse_at(tmp_path / "box-2-def.pulse", NOW - 1)
    assert is_fresh(tmp_path, host="box", now=NOW)


def test_a_worker_that_lost_a_slot_has_no_pulse(host: Host, tmp_path: Path) -> None:
    runner = Runner(host, queues=["default"], slots=1, poll_seconds=0.1)
    renew = pulse(tmp_path / "box.pulse", runner.is_whole)
    renew()
    assert not (tmp_path / "box.pulse").exists()  # its slot does not run yet
    runner.start()
    renew()
    assert (tmp_path / "box.pulse").exists()
    runner.drain()
    assert runner.join(120)
    assert not runner.is_whole()


def test_a_running_worker_renews_its_pulse_and_takes_it_along(
    depot: Depot, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker()
    wait_until(lambda: list((tmp_path / "work").glob("*.pulse")))
    assert worker.terminate() == 0
    assert not list((tmp_path / "work").glob("*.pulse"))
