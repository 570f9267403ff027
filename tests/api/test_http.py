"""Credentials, hostile requests, limits, failures of the parts, and what the log says about them."""

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event, text
from starlette.testclient import TestClient

from api import guard, logs
from api.context import Depot
from api.errors import STATUS, status_of
from api.main import create_app
from registry import errors
from registry.db import SessionFactory, transaction
from registry.errors import DepotError
from registry.jobs.queries import list_jobs
from registry.keys import create_key, revoke_key
from registry.settings import Settings
from registry.tenants import default_tenant
from tests.api.conftest import BASE, SECRET, bearer, error_of, refused, upload

JSON = {"content-type": "application/json"}
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


class TestCredentials:
    @pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "Token x"])
    def test_none(self, client: TestClient, value: str) -> None:
        refused(client.get("/v1/files", headers={"Authorization": value}), 401, "missing_credentials")

    @pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
    def test_the_scheme_has_no_case(self, client: TestClient, key: str, scheme: str) -> None:
        assert client.get("/v1/files", headers={"Authorization": f"{scheme} {key}"}).status_code == 200

    def test_two_headers_are_ambiguous(self, client: TestClient, key: str) -> None:
        twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
        del client.headers["Authorization"]
        refused(client.get("/v1/files", headers=twice), 400, "ambiguous_credentials")

    def test_a_wrong_key_says_what_to_do(self, client: TestClient, key: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        error = refused(client.get("/v1/files", headers=bearer(key[:-1] + "!")), 401, "invalid_api_key")
        assert "operator" in error["message"]
        assert error["type"] == "authentication_error"
        assert all(record.exc_info is None for record in caplog.records)

    @pytest.mark.parametrize("other", ["x", "eyJhbGciOiJub25lIn0.e30.", "ld_" + "0" * 50, "ключ".encode()])
    def test_made_up_keys_never_reach_the_database(self, app: FastAPI, client: TestClient, other: Any) -> None:
        depot: Depot = app.state.depot
        statements: list[str] = []
        event.listen(depot.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        value = b"Bearer " + (other if isinstance(other, bytes) else other.encode())
        refused(client.get("/v1/files", headers={"Authorization": value}), 401, "invalid_api_key")
        assert statements == []

    def test_right_id_wrong_secret(self, client: TestClient, key: str, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            tenant = default_tenant(session).id
            foreign = create_key(session, tenant_id=tenant, name="x", pepper=b"another pepper")
        refused(client.get("/v1/files", headers=bearer(foreign)), 401, "invalid_api_key")

    def test_revoked(self, client: TestClient, key: str, sessions: SessionFactory) -> None:
        with transaction(sessions) as session:
            revoke_key(session, tenant_id=default_tenant(session).id, key_id=key[3:15])
        refused(client.get("/v1/files"), 401, "key_revoked")


class TestAddresses:
    @pytest.mark.parametrize("path", ["/", "/v1", "/v1/nope", "/v1/files/", "/redoc", "/v1/files/x/y/z"])
    def test_unknown(self, client: TestClient, path: str) -> None:
        refused(client.get(path), 404, "route_not_found")

    @pytest.mark.parametrize(("method", "path"), [("PATCH", "/v1/files"), ("TRACE", JOBS), ("HEAD", "/v1/files")])
    def test_a_method_the_address_does_not_have(self, client: TestClient, method: str, path: str) -> None:
        response = client.request(method, path)
        assert response.status_code == 405
        assert response.headers["allow"] == "GET, POST"
        if method != "HEAD":
            refused(response, 405, "method_not_allowed")

    def test_no_cors(self, client: TestClient) -> None:
        headers = {"Origin": "https://evil", "Access-Control-Request-Method": "POST"}
        response = client.options(JOBS, headers=headers)
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_method_override_is_ignored(self, client: TestClient, file_id: str) -> None:
        client.get(f"/v1/files/{file_id}", headers={"X-HTTP-Method-Override": "DELETE"})
        assert client.get(f"/v1/files/{file_id}").status_code == 200

    @pytest.mark.parametrize("path", ["/v1/files/%00", "/v1/files/%ff", "/v1/adapters?search=%00", "/v1/files/%c3%28"])
    def test_what_is_not_text(self, client: TestClient, path: str) -> None:
        refused(client.get(path), 400, "invalid_encoding")

    def test_too_long(self, client: TestClient) -> None:
        refused(client.get("/v1/adapters?search=" + "x" * 9000), 414, "url_too_long")

    @pytest.mark.parametrize("name", ["absent", "\u202e", "x" * 500, "a%25b", "..", "%2e%2e%2fx", "'; drop table jobs"])
    def test_strange_names_are_not_found(self, client: TestClient, name: str) -> None:
        for address in (f"/v1/adapters/{name}/versions/1", f"/v1/models/{name}", f"/v1/base-models/{name}"):
            assert client.get(address).status_code == 404, address

    @pytest.mark.parametrize("version", ["0", "-1", "9" * 30, "v", "1.0", "١", "latest ", "%F0%9F%98%80"])
    def test_strange_versions_are_not_found(self, client: TestClient, version: str) -> None:
        assert client.get(f"/v1/adapters/absent/versions/{version}").status_code == 404


class TestHeaders:
    def test_every_answer_names_its_request(self, client: TestClient) -> None:
        answers = [client.get("/healthz"), client.get("/v1/nope"), client.get("/v1/files/%00")]
        ids = {answer.headers["x-request-id"] for answer in answers}
        assert len(ids) == 3
        assert all(answer.headers["x-content-type-options"] == "nosniff" for answer in answers)

    def test_the_clients_own_request_id_is_not_taken(self, client: TestClient) -> None:
        assert client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] != "mine"

    @pytest.mark.parametrize(
        "headers",
        [
            {"x-a": "x" * 9000},
            {f"x-{n}": "v" for n in range(120)},
            {f"x-{n}": "v" * 900 for n in range(30)},
            {"Range": "bytes=" + ",".join(["0-0"] * 5000)},
        ],
        ids=["one long", "many", "long together", "long range"],
    )
    def test_too_large(self, client: TestClient, headers: dict[str, str]) -> None:
        refused(client.get("/healthz", headers=headers), 431, "headers_too_large")

    @pytest.mark.parametrize("value", ["gzip", "br", "deflate, gzip"])
    def test_compressed_bodies(self, client: TestClient, value: str) -> None:
        response = client.post(JOBS, content=b"\x1f\x8b", headers={**JSON, "content-encoding": value})
        refused(response, 415, "unsupported_content_encoding")


class TestBodies:
    def post(self, client: TestClient, content: Any, content_type: str = "application/json") -> Any:
        return client.post(JOBS, content=content, headers={"content-type": content_type})

    @pytest.mark.parametrize(
        "content", [b"{", b"nonsense", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"{'a': 1}", b'{"a": 1}{}', b" " * 1000]
    )
    def test_not_json(self, client: TestClient, content: bytes) -> None:
        refused(self.post(client, content), 400, "invalid_json")

    @pytest.mark.parametrize(
        "content", [b"\xff{}", "{}".encode("utf-16"), b"\xef\xbb\xbf{}", b'{"model": "a\\u0000b"}', b'{"\\u0000": 1}']
    )
    def test_not_text(self, client: TestClient, content: bytes) -> None:
        assert self.post(client, content).json()["error"]["code"] in {"invalid_encoding", "invalid_json"}
        assert self.post(client, content).status_code == 400

    @pytest.mark.parametrize("content", [b"[" * 33 + b"]" * 33, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"[" * 500_000])
    def test_too_deep(self, client: TestClient, content: bytes) -> None:
        assert refused(self.post(client, content), 400, "json_too_deep")

    def test_thirty_two_levels_are_read(self, client: TestClient) -> None:
        assert self.post(client, b"[" * 32 + b"]" * 32).status_code == 422

    @pytest.mark.parametrize("content", [b"true", b"[]", b'""', b"1", b"null"])
    def test_not_an_object(self, client: TestClient, content: bytes) -> None:
        assert self.post(client, content).status_code == 422

    def test_empty(self, client: TestClient) -> None:
        refused(self.post(client, b""), 422, "missing_field")

    @pytest.mark.parametrize(
        "content_type",
        ["text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16", "", "application/jsonx"],
    )
    def test_other_media_types(self, client: TestClient, content_type: str) -> None:
        refused(self.post(client, b"{}", content_type), 415, "unsupported_media_type")

    @pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/json;charset=UTF-8"])
    def test_json_in_utf8(self, client: TestClient, content_type: str) -> None:
        refused(self.post(client, b"{}", content_type), 422, "missing_field")

    def test_a_declared_size_is_refused_before_it_is_read(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="api.requests")
        error = refused(self.post(client, b" " * (2**20 + 1)), 413, "body_too_large")
        assert error["details"]["limit_bytes"] == 2**20
        assert [r.bytes_in for r in caplog.records if r.name == "api.requests"] == [0]

    def test_an_undeclared_size_stops_at_the_limit(self, client: TestClient) -> None:
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(200):
                sent += 1
                yield b" " * 2**16

        refused(self.post(client, endless()), 413, "body_too_large")

    def test_a_client_on_a_socket_reads_the_refusal(self, server: str, key: str) -> None:
        response = httpx.post(server + JOBS, content=b" " * 3_000_000, headers={**bearer(key), **JSON})
        refused(response, 413, "body_too_large")

    def test_a_body_that_stops_arriving(self, server: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import socket
        from urllib.parse import urlsplit

        monkeypatch.setattr(guard, "BODY_IDLE_SECONDS", 0.2)
        address = urlsplit(server)
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            head = f"POST {JOBS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{").encode())
            answer = b""
            while b"}}" not in answer and (more := connection.recv(65536)):
                answer += more
        assert b" 408 " in answer.splitlines()[0]
        assert b"body_timeout" in answer


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
    with httpx.Client(base_url=server, headers=bearer(key)) as client:
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
