"""Commands of the operator, as the shell runs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.admin import main
from registry.settings import Settings
from tests.api.conftest import SECRET


@pytest.fixture
def run(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """`python -m api.admin …`: its exit status and what it printed."""
    monkeypatch.setenv("DEPOT_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("DEPOT_STORE_URL", settings.store_url)
    monkeypatch.setenv("DEPOT_SECRET_KEY", SECRET)
    monkeypatch.setenv("DEPOT_GC_GRACE_SECONDS", "0.000001")

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        return main(arguments), capsys.readouterr().out

    return call


def test_gc_frees_what_a_deleted_file_held(client: TestClient, file_id: str, run: Any) -> None:
    size = client.get(f"/v1/files/{file_id}").json()["bytes"]
    assert run("gc", "--dry-run") == (0, "would condemn 0 objects, 0 bytes\nwould free 0 objects, 0 bytes\n")
    client.delete(f"/v1/files/{file_id}")
    assert f"would condemn 1 objects, {size} bytes\n" in run("gc", "--dry-run")[1]
    assert f"freed 1 objects, {size} bytes\n" in run("gc")[1]
    assert "would free 0 objects" in run("gc", "--dry-run")[1]


def test_verify_ends_with_a_status_that_says_what_it_found(
    client: TestClient, file_id: str, run: Any, tmp_path: Path
) -> None:
    (stored,) = (path for path in (tmp_path / "objects").rglob("*") if path.is_file() and "blobs" in path.parts)
    status, said = run("verify")
    assert "missing" not in said  # the fixture's base model has rows without bytes under keys of its own
    stored.unlink()
    status, said = run("verify", "--digests")
    assert status == 1 and "missing\tblobs/" in said
