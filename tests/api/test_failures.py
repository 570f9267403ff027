"""Failures of the parts, what clients are told about them, and what the log says."""

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.testclient import TestClient

from api import logs
from api.errors import STATUS, status_of
from api.main import create_app
from registry import errors
from registry.db import SessionFactory, transaction
from registry.errors import DepotError
from registry.jobs.queries import list_jobs
from registry.settings import Settings
from tests.api.conftest import BASE, SECRET, bearer, error_of, refused, upload

JOBS = "/v1/fine_tuning/jobs"

# A deferred trigger: every statement of the request succeeds, only its COMMIT does not.
FAILS_AT_COMMIT = """
CREATE FUNCTION fails_at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
CREATE CONSTRAINT TRIGGER fails_at_commit AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION fails_at_commit();
"""


@pytest.fixture
def quiet(client: TestClient) -> TestClient:
    """A client that sees a 500 as its user does."""
    return TestClient(client.app, headers=dict(client.headers), raise_server_exceptions=False)


class TestFailures:
    def test_a_failed_commit_is_not_shown_as_success(
        self, quiet: TestClient, sessions: SessionFactory, tenant_id: uuid.UUID
    ) -> None:
        body = {"model": BASE, "training_file": upload(quiet).json()["id"], "suffix": "x"}
        with transaction(sessions) as session:
            session.execute(text(FAILS_AT_COMMIT))
        try:
            response = quiet.post(JOBS, json=body)
        finally:
            with transaction(sessions) as session:
                session.execute(text("DROP TRIGGER fails_at_commit ON jobs; DROP FUNCTION fails_at_commit"))
        refused(response, 500, "internal")
        with transaction(sessions) as session:
            assert list_jobs(session, tenant_id=tenant_id, limit=10).items == []

    def test_a_bug_shows_nothing_and_is_logged_with_its_request(
        self, quiet: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("secret detail")

        monkeypatch.setattr("api.openai.files.list_files", broken)
        response = quiet.get("/v1/files")
        error = refused(response, 500, "internal")
        assert "secret" not in response.text
        assert error["type"] == "server_error"
        (record,) = [r for r in caplog.records if r.exc_info]
        assert record.request_id == response.headers["x-request-id"]

    def test_no_database(self, settings: Settings, key: str, caplog: pytest.LogCaptureFixture) -> None:
        gone = settings.model_copy(update={"database_url": "postgresql+psycopg://nobody@127.0.0.1:1/none"})
        with TestClient(create_app(gone), headers=bearer(key)) as client:
            response = client.get("/v1/files")
            refused(response, 503, "unavailable")
            assert response.headers["retry-after"]
            error = refused(client.get("/readyz"), 503, "not_ready")
            assert set(error["details"]["failed"]) == {"database"}
            assert client.get("/healthz").json() == {"status": "ok"}
        assert "127.0.0.1:1" not in response.text
        assert all(record.exc_info is None for record in caplog.records)

    def test_no_store(self, app: FastAPI, client: TestClient, file_id: str, settings: Settings) -> None:
        import shutil

        shutil.rmtree(settings.store_url.removeprefix("file://"))
        refused(client.get(f"/v1/files/{file_id}/content"), 503, "storage_unavailable")
        refused(upload(client), 503, "storage_unavailable")
        assert set(refused(client.get("/readyz"), 503, "not_ready")["details"]["failed"]) == {"store"}

    def test_readiness_needs_the_newest_migration(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        assert client.get("/readyz").json() == {"status": "ready", "checks": {"database": "ok", "store": "ok"}}
        monkeypatch.setattr("registry.schema_version._head", lambda: "newer")
        error = refused(client.get("/readyz"), 503, "not_ready")
        assert "alembic upgrade head" in error["details"]["failed"]["database"]


def test_a_corrupt_file_is_a_broken_transfer_for_a_real_client(server: str, key: str, settings: Settings) -> None:
    with httpx.Client(base_url=server, headers=bearer(key), timeout=120) as client:
        file_id = upload(client).json()["id"]
        (stored,) = [p for p in Path(settings.store_url.removeprefix("file://"), "blobs").rglob("*") if p.is_file()]
        stored.chmod(0o600)
        stored.write_bytes(stored.read_bytes()[:-2] + b"!\n")
        with pytest.raises(httpx.RemoteProtocolError):
            client.get(f"/v1/files/{file_id}/content")
        assert client.get("/healthz").status_code == 200


class TestErrorTable:
    def every(self, family: type[DepotError] = DepotError) -> Iterator[type[DepotError]]:
        for error in family.__subclasses__():
            yield error
            yield from self.every(error)

    def test_every_error_has_a_message_and_each_code_one_status(self) -> None:
        statuses: dict[str, int] = {}
        for error in self.every():
            assert status_of(error) in set(STATUS.values())
            assert statuses.setdefault(error.code, status_of(error)) == status_of(error)
            assert error().message.endswith(".")

    def test_families(self) -> None:
        assert [status_of(e) for e in (errors.JobNotFound, errors.JobTerminal, errors.QuotaExceeded)] == [404, 409, 429]
        assert status_of(errors.ArtifactCorrupt) == 500


class TestLog:
    def test_one_line_per_request_without_path_query_or_key(
        self, client: TestClient, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="api.requests")
        client.get("/v1/objects/sometoken.abc")
        client.get("/v1/files", params={"after": "sometoken"})
        client.get("/nowhere/sometoken")
        records = [r for r in caplog.records if r.name == "api.requests"]
        assert [(r.route, r.status) for r in records] == [
            ("/v1/objects/{token}", 403),
            ("/v1/files", 400),
            (None, 404),
        ]
        output = "\n".join(logs.JsonLines().format(record) for record in records)
        assert "sometoken" not in output
        assert key not in output
        assert records[1].key_id == key[3:15]

    def test_secrets_are_redacted_wherever_they_appear(self, key: str) -> None:
        record = logging.makeLogRecord(
            {"msg": "key %s", "args": (key,), "link": "http://h/v1/objects/abc.def?X-Amz-Signature=0a1b", "level": "x"}
        )
        line = logs.JsonLines().format(record)
        assert key not in line
        assert "abc.def" not in line
        assert "0a1b" not in line
        assert json.loads(line)["message"] == "key [redacted]"

    def test_a_traceback_is_part_of_its_line(self) -> None:
        try:
            raise ValueError("x")
        except ValueError as error:
            info = (type(error), error, error.__traceback__)
        line = logs.JsonLines().format(logging.makeLogRecord({"msg": "m", "exc_info": info}))
        assert "ValueError" in json.loads(line)["traceback"]


def test_admin_prints_a_key_that_works(
    app: FastAPI, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.admin import main

    monkeypatch.setenv("DEPOT_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("DEPOT_STORE_URL", settings.store_url)
    monkeypatch.setenv("DEPOT_SECRET_KEY", SECRET)
    main(["create-key", "--name", "laptop"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    with TestClient(app, headers=bearer(printed.strip())) as client:
        assert client.get("/v1/files").status_code == 200


def test_uploads_left_by_a_killed_process_are_removed(app: FastAPI, settings: Settings) -> None:
    import os

    folder = settings.work_dir / "uploads"
    folder.mkdir(parents=True)
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    with TestClient(app):
        assert list(folder.iterdir()) == [new]


def test_error_shape_is_checked_by_these_tests(client: TestClient) -> None:
    assert error_of(client.get("/v1/nope"))["type"] == "invalid_request_error"
