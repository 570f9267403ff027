"""`lora-depot up` with a real Postgres and Valkey, and toys in place of api and worker."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cli.embedded.process import is_alive
from tests.cli.clusters import copy_cluster
from tests.cli.depot import DEADLINE, Depot, clean, wait_for
from tests.ports import free_port

PARTS = {"postgres", "valkey", "api", "worker"}


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    root = tmp_path / "home"
    root.mkdir(mode=0o700)
    copy_cluster(root / "pg")
    # A guardian gives it seconds to stop: whether the disk is quick enough for that is not what these tests are about.
    with (root / "pg" / "postgresql.conf").open("a") as settings:
        settings.write("\nfsync = off\n")
    yield from clean(Depot(root))


def test_everything_starts_and_stops_and_keeps_its_data(depot: Depot) -> None:
    for count in (1, 2):
        process = depot.up()
        assert set(depot.children()) == PARTS
        assert depot.query("SELECT count(*) FROM starts") == (count,)
        assert depot.query("SELECT count(*) FROM keys") == (1,)
        client = json.loads(depot.home.client.read_text())
        assert client["url"] == depot.state()["url"]
        assert depot.query(f"SELECT 1 FROM keys WHERE key = '{client['api_key']}'") == (1,)
        assert depot.stop(process, signal.SIGINT if count == 1 else signal.SIGTERM) == 0
        assert depot.processes() == []
        assert (depot.home.work / "drained").exists()
        assert not depot.home.state.exists()
    assert "database system is shut down" in depot.home.log("postgres").read_text()
    assert client["url"] in depot.said()
    assert client["api_key"] not in depot.said() + depot.home.log("create-key").read_text()


def test_a_key_that_the_service_refuses_is_replaced(depot: Depot) -> None:
    depot.stop(depot.up())
    first = json.loads(depot.home.client.read_text())["api_key"]
    depot.home.client.write_text(json.dumps({"url": "", "api_key": "ld_of_another_database"}))
    depot.up()
    assert json.loads(depot.home.client.read_text())["api_key"] not in (first, "ld_of_another_database")


def test_everything_below_home_is_private_and_nothing_above_it_changes(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    before = {parent: parent.stat().st_mode for parent in (closed, *closed.parents)}
    for depot in clean(Depot(closed / "home")):
        depot.up()
        depot.stop(depot.started[0])
        paths = [depot.home.root, *depot.home.root.rglob("*")]
        open_to_others = [p for p in paths if p.exists() and p.stat().st_mode & 0o077]
        # Valkey creates its own files; its directory is closed.
        assert [p for p in open_to_others if depot.home.valkey not in p.parents] == []
        assert stat.S_IMODE(depot.home.client.stat().st_mode) == 0o600
        assert stat.S_IMODE((depot.home.root / "secret").stat().st_mode) == 0o600
    assert {parent: parent.stat().st_mode for parent in before} == before


def test_a_second_up_says_where_the_first_runs_and_harms_nothing(depot: Depot) -> None:
    depot.up()
    children, url = depot.children(), depot.state()["url"]
    second = depot.up(ready=False)
    assert second.wait(DEADLINE) == 1
    assert f"already running at {url}" in depot.said()
    assert f"pid {depot.started[0].pid}" in depot.said()
    assert depot.children() == children
    assert depot.query("SELECT count(*) FROM starts") == (1,)


def test_kill_9_of_the_supervisor_leaves_no_process(depot: Depot) -> None:
    process = depot.up()
    guardian = depot.guardian()
    process.kill()
    process.wait()
    wait_for(lambda: not depot.processes(), "nothing runs")
    assert not is_alive(guardian.pid)
    assert (depot.home.work / "drained").exists()
    assert "database system is shut down" in depot.home.log("postgres").read_text()


def test_a_new_up_waits_for_the_clean_up_after_a_killed_one(depot: Depot) -> None:
    first = depot.up()
    old = set(depot.children().values())
    guardian = depot.guardian()
    guardian.suspend()  # the clean-up takes a while
    first.kill()
    first.wait()
    second = depot.up(ready=False)
    wait_for(lambda: "Waiting for an earlier run" in depot.said(), "it waits")
    assert all(is_alive(pid) for pid in old)
    guardian.resume()
    depot.wait_ready(second)
    assert not any(is_alive(pid) for pid in old)
    assert depot.query("SELECT count(*) FROM starts") == (2,)


def test_kill_9_while_starting_leaves_no_process(depot: Depot) -> None:
    for name in ("postgres", "valkey", "api"):
        process = depot.up(ready=False)
        wait_for(lambda name=name: name in depot.children(), f"{name} has started")
        process.kill()
        process.wait()
        wait_for(lambda: not depot.processes(), "nothing runs")
    depot.up()


def test_kill_9_in_the_middle_of_initdb_is_recovered(depot: Depot) -> None:
    shutil.rmtree(depot.home.postgres)
    process = depot.up(ready=False)
    wait_for(lambda: list(depot.home.root.glob(".pg-new-*/PG_VERSION")), "initdb has begun")
    process.send_signal(signal.SIGSTOP)  # what initdb makes now is not given its name any more
    in_time = not depot.home.postgres.exists()
    process.kill()
    process.wait()
    assert depot.home.postgres.exists() != in_time
    depot.up()
    assert depot.query("SELECT count(*) FROM starts") == (1,)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_a_killed_child_is_started_again(depot: Depot, name: str) -> None:
    depot.up()
    killed = depot.children()[name]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: depot.children().get(name) not in (None, killed), f"{name} runs again")
    wait_for(lambda: depot.query("SELECT count(*) FROM starts") == (1,) if name != "postgres" else True, "data")
    assert f"{name} stopped (killed by SIGKILL); starting it again in 1 s" in depot.said()
    assert depot.stop(depot.started[0]) == 0
    assert depot.processes() == []


def test_a_killed_guardian_is_replaced_and_its_successor_knows_the_children(depot: Depot) -> None:
    process = depot.up()
    first, worker = depot.guardian().pid, depot.children()["worker"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: [p for p in depot.processes() if depot_guardian(p) and p.pid != first], "a new guardian")
    os.kill(worker, signal.SIGKILL)  # by the time that it runs again the guardian was told of all
    wait_for(lambda: depot.children().get("worker") not in (None, worker), "the worker runs again")
    process.kill()
    process.wait()
    wait_for(lambda: not depot.processes(), "nothing runs")


def depot_guardian(process: psutil.Process) -> bool:
    try:
        return "cli.embedded.guardian" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_what_a_killed_supervisor_and_guardian_leave_is_ended_by_the_next_up(depot: Depot) -> None:
    process = depot.up()
    old = set(depot.children().values())
    guardian = depot.guardian()
    process.send_signal(signal.SIGSTOP)  # it must not replace the guardian
    guardian.kill()
    process.kill()
    process.wait()
    assert any(is_alive(pid) for pid in old)
    depot.up()
    assert not any(is_alive(pid) for pid in old)
    assert depot.query("SELECT count(*) FROM starts") == (2,)


def test_kill_9_of_every_process_at_once_loses_nothing(depot: Depot) -> None:
    process = depot.up()
    process.send_signal(signal.SIGSTOP)
    for victim in depot.processes():
        victim.kill()
    process.wait()
    wait_for(lambda: not depot.processes(), "nothing runs")
    depot.up()
    assert depot.query("SELECT count(*) FROM starts") == (2,)


def test_a_stale_postmaster_pid_of_a_stranger_does_not_stop_the_start(depot: Depot) -> None:
    depot.stop(depot.up())
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (depot.home.postgres / "postmaster.pid").write_text(f"{stranger.pid}\n{depot.home.postgres}\n")
        depot.up()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_second_ctrl_c_kills_what_does_not_stop(depot: Depot) -> None:
    process = depot.up()
    os.kill(depot.children()["worker"], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "Stopping" in depot.said(), "it stops")
    assert depot.stop(process) == 0
    assert "Killing" in depot.said()
    assert depot.processes() == []


def test_ctrl_c_while_starting_stops_cleanly(depot: Depot) -> None:
    process = depot.up(ready=False)
    wait_for(lambda: "valkey" in depot.children(), "valkey has started")
    assert depot.stop(process) == 0
    assert depot.processes() == []


def test_a_port_that_is_taken_is_named(depot: Depot) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert depot.up(str(port), ready=False).wait(DEADLINE) == 1
        assert f"Port {port} is taken" in depot.said()
    depot.up(str(port))
    assert depot.state()["url"] == f"http://127.0.0.1:{port}"


def test_a_depot_that_opened_the_port_first_is_not_taken_for_ours(depot: Depot) -> None:
    depot.up("raced")
    assert re.search(r"address already in use", depot.home.log("api").read_text(), re.IGNORECASE)
    client = json.loads(depot.home.client.read_text())
    assert client["url"] == depot.state()["url"]
    wrong = {"Authorization": "Bearer wrong"}
    assert httpx.get(client["url"], headers=wrong, trust_env=False, timeout=120).status_code == 401
    assert set(depot.children()) == PARTS


def test_a_wished_for_port_that_somebody_opened_first_is_an_error(depot: Depot) -> None:
    port = free_port()
    assert depot.up(str(port), "raced", ready=False).wait(DEADLINE) == 1
    assert "api ended before it was ready" in depot.said()
    assert "ddress already in use" in depot.said()
    assert depot.processes() == []


def test_two_homes_run_side_by_side(depot: Depot, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    copy_cluster(tmp_path / "other" / "pg")
    for other in clean(Depot(tmp_path / "other")):
        depot.up()
        other.up()
        assert depot.state()["url"] != other.state()["url"]
        other.stop(other.started[0])
        assert set(depot.children()) == PARTS
        assert depot.query("SELECT 1") == (1,)


def test_a_child_that_cannot_start_shows_the_end_of_its_log(depot: Depot) -> None:
    depot.home.work.mkdir()
    (depot.home.work / "schema-too-new").touch()
    assert depot.up(ready=False).wait(DEADLINE) == 1
    assert "migrate failed (exit status 3)" in depot.said()
    assert "the schema is newer than this release" in depot.said()
    assert depot.processes() == []


def test_a_home_that_others_may_write_in_is_refused(depot: Depot) -> None:
    depot.home.root.chmod(0o777)
    assert depot.up(ready=False).wait(DEADLINE) == 1
    assert f"chmod go-w {depot.home.root}" in depot.said()


def test_a_home_with_a_long_and_strange_name_works(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 30) / "with spaces, $[x] and ü"
    root.mkdir(parents=True, mode=0o700)
    copy_cluster(root / "pg")
    for depot in clean(Depot(root)):
        depot.up()
        assert depot.query("SELECT count(*) FROM starts") == (1,)
        assert depot.stop(depot.started[0]) == 0
        assert depot.processes() == []
