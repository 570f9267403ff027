import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from cli.embedded import account
from cli.embedded.account import NAMESPACE, NOBODY, find_account
from cli.embedded.postgres import create_cluster, find_programs, postgres_spec, start_postgres
from cli.embedded.process import EmbeddedError, spawn
from cli.embedded.sockets import private_socket_dir
from cli.embedded.valkey import answers_ping, start_valkey
from tests.cli.clusters import copy_cluster

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


def query(url: str, statement: str) -> tuple[object, ...] | None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone() if cursor.description else None


def command(path: Path, *words: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
        return client.recv(1024)


def modes_above(path: Path) -> dict[Path, int]:
    return {parent: parent.stat().st_mode for parent in path.parents}


def test_postgres_keeps_its_data_and_changes_nothing_above_it(home: Path) -> None:
    before = modes_above(home / "pg")
    for count in (1, 2):
        server = start_postgres(home / "pg", home / "run", home / "pg.log")
        query(server.url, "CREATE TABLE IF NOT EXISTS kept (id serial, word text)")
        query(server.url, "INSERT INTO kept (word) VALUES ('größe')")
        assert query(server.url, "SELECT count(*) FROM kept") == (count,)
        server.stop()
        assert server.process.returncode == 0
    assert modes_above(home / "pg") == before
    assert {p.name for p in home.iterdir()} == {"pg", "run", "pg.log"}
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in home.iterdir())


def test_postgres_is_utf8_with_checksums_and_no_tcp_port(home: Path) -> None:
    copy_cluster(home / "pg")
    server = start_postgres(home / "pg", home / "run", home / "pg.log")
    try:
        names = ("server_encoding", "data_checksums", "listen_addresses", "fsync")
        shown = ", ".join(f"current_setting('{name}')" for name in names)
        assert query(server.url, f"SELECT {shown}, upper('ß ö')") == ("UTF8", "on", "", "on", "ß Ö")
        process = psutil.Process(server.process.pid)
        assert [c for c in process.net_connections("inet") if c.status == "LISTEN"] == []
    finally:
        server.stop()


def test_an_interrupted_initdb_leaves_nothing_that_is_taken_for_data(home: Path) -> None:
    interrupted = home / ".pg-new-abc"
    (interrupted / "base").mkdir(parents=True)
    (interrupted / "PG_VERSION").write_text("18\n")
    server = start_postgres(home / "pg", home / "run", home / "pg.log")
    try:
        assert query(server.url, "SELECT 1") == (1,)
    finally:
        server.stop()
    assert not interrupted.exists()


def test_old_data_gets_the_postgres_that_made_it(home: Path) -> None:
    (home / "pg").mkdir()
    (home / "pg" / "PG_VERSION").write_text("16\n")
    version = subprocess.run([find_programs(home / "pg") / "postgres", "--version"], capture_output=True, text=True)
    assert " 16." in version.stdout
    (home / "pg" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match="made by Postgres 9; installed"):
        find_programs(home / "pg")


def test_a_failed_start_shows_the_log_and_leaves_no_process(home: Path) -> None:
    copy_cluster(home / "pg")
    with pytest.raises(EmbeddedError, match="unrecognized configuration parameter") as caught:
        start_postgres(home / "pg", home / "run", home / "pg.log", settings={"no_such_setting": "1"})
    assert str(home / "pg.log") in str(caught.value)
    assert not any(str(home) in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))


def test_an_initdb_that_fails_leaves_nothing_and_a_full_disk_is_called_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = home / "programs"
    programs.mkdir()
    (programs / "initdb").write_text("#!/bin/sh\necho 'FATAL: No space left on device' >&2; exit 1\n")
    (programs / "initdb").chmod(0o700)
    with pytest.raises(EmbeddedError, match="disk is full: free some space"):
        create_cluster(home / "pg", programs, account.OURSELVES)
    assert list(home.iterdir()) == [programs]


@needs_root
@pytest.mark.parametrize("chosen", [NAMESPACE, NOBODY], ids=["namespace", "nobody"])
def test_root_runs_postgres_below_a_directory_of_mode_700(
    home: Path, chosen: account.Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.embedded.postgres.find_account", lambda *_: chosen)
    before = modes_above(home / "pg")
    server = start_postgres(home / "pg", home / "run", home / "pg.log")
    try:
        assert query(server.url, "SELECT current_user::text") == ("depot",)
    finally:
        server.stop()
    assert (home / "pg").stat().st_uid == chosen.uid
    assert modes_above(home / "pg") == before


@needs_root
def test_root_may_change_the_way_it_runs_on_the_same_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_cluster(home / "pg")
    for chosen in (NAMESPACE, NOBODY, NAMESPACE):
        monkeypatch.setattr("cli.embedded.postgres.find_account", lambda *_, now=chosen: now)
        server = start_postgres(home / "pg", home / "run", home / "pg.log")
        server.stop()
        assert {p.stat().st_uid for p in (home / "pg").rglob("*")} == {chosen.uid}


@needs_root
def test_root_without_namespaces_gets_nobody_and_without_both_an_explanation(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = home / "bin"
    refusing.mkdir()
    (refusing / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (refusing / "unshare").chmod(0o700)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{refusing}:{path}")
    program = find_programs(home / "pg") / "postgres"
    assert find_account(program, home) == NOBODY
    shutil.copy(refusing / "unshare", refusing / "setpriv")
    with pytest.raises(EmbeddedError, match="max_user_namespaces"):
        find_account(program, home)


def test_valkey_keeps_its_data_over_kill_9(home: Path) -> None:
    path = home / "run" / "valkey.sock"
    server = start_valkey(home / "valkey", home / "run", home / "valkey.log")
    assert server.url == f"redis+socket://{path}"
    assert command(path, b"SET", b"word", b"kept") == b"+OK\r\n"
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server = start_valkey(home / "valkey", home / "run", home / "valkey.log")
    try:
        assert command(path, b"GET", b"word") == b"$4\r\nkept\r\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    finally:
        server.stop()
    assert not answers_ping(path)


@pytest.fixture
def long_home(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / ("long" * 30) / "and with spaces, $ and ü"
    path.mkdir(parents=True, mode=0o700)
    stand_in = private_socket_dir(path / "run")
    yield path
    shutil.rmtree(stand_in, ignore_errors=True)


def test_a_home_too_long_for_a_socket_works(long_home: Path) -> None:
    copy_cluster(long_home / "pg")
    sockets = private_socket_dir(long_home / "run")
    assert sockets.parent == Path(tempfile.gettempdir())
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    postgres = start_postgres(long_home / "pg", long_home / "run", long_home / "pg.log")
    valkey = start_valkey(long_home / "valkey", long_home / "run", long_home / "valkey.log")
    try:
        assert query(postgres.url, "SELECT 1") == (1,)
        assert answers_ping(Path(valkey.url.removeprefix("redis+socket://")))
    finally:
        valkey.stop()
        postgres.stop()


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_socket_directory_that_others_can_enter_is_refused(long_home: Path, mode: int) -> None:
    private_socket_dir(long_home / "run").chmod(mode)
    with pytest.raises(EmbeddedError, match="mode 0700"):
        private_socket_dir(long_home / "run")


def test_a_socket_directory_that_is_a_link_is_refused(long_home: Path) -> None:
    stand_in = private_socket_dir(long_home / "run")
    stand_in.rmdir()
    stand_in.symlink_to(long_home)
    try:
        with pytest.raises(EmbeddedError, match="mode 0700"):
            private_socket_dir(long_home / "run")
    finally:
        stand_in.unlink()


@needs_root
def test_a_socket_directory_of_somebody_else_is_refused(long_home: Path) -> None:
    os.chown(private_socket_dir(long_home / "run"), 65534, 65534)
    with pytest.raises(EmbeddedError, match="of yours"):
        private_socket_dir(long_home / "run")


def test_postgres_stops_when_its_starter_asks_while_clients_are_connected(home: Path) -> None:
    copy_cluster(home / "pg")
    server = start_postgres(home / "pg", home / "run", home / "pg.log")
    connection = psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True)
    server.stop()
    assert server.process.returncode == 0
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


def test_a_child_gets_no_terminal_and_a_private_log(home: Path) -> None:
    copy_cluster(home / "pg")
    spec = postgres_spec(home / "pg", home / "run", home / "pg.log")
    process = spawn(spec)
    try:
        deadline = time.monotonic() + 60
        while not spec.ready() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert os.getsid(process.pid) == process.pid
        assert stat.S_IMODE((home / "pg.log").stat().st_mode) == 0o600
    finally:
        process.send_signal(spec.stop_signal)
        process.wait()
