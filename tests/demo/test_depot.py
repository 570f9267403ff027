"""The demo finds a depot or starts one, and leaves none behind that it started."""

import json
from pathlib import Path

import psutil
import pytest

from cli.home import Home
from demo.depot import DepotFailed, demo_home, find_client, running_depot


def test_a_depot_is_started_used_again_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    monkeypatch.setenv("DEPOT_URL", "http://127.0.0.1:9")  # of the user's other depot: not for the demo
    monkeypatch.setenv("DEPOT_API_KEY", "ld_other")
    with running_depot(home) as (client, ours):
        assert ours
        assert client.readiness() == {"database": "ok", "store": "ok"}
        pid = json.loads(home.state.read_text())["pid"]
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        with running_depot(home) as (again, started_again):
            assert not started_again
            assert again.url == client.url
        assert client.readiness()  # leaving the inner one stopped nothing
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    assert find_client(home) is None


def test_a_depot_that_cannot_start_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "pg").write_text("no directory")
    with pytest.raises(DepotFailed, match="pg"), running_depot(Home(home)):
        raise AssertionError("nothing runs")


def test_the_demo_keeps_away_from_the_users_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEPOT_HOME", raising=False)
    assert demo_home().root == tmp_path / ".demo" / "home"
    monkeypatch.setenv("DEPOT_HOME", str(tmp_path / "chosen"))
    assert demo_home().root == tmp_path / "chosen"
