"""Credentials, hostile requests and limits."""

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from starlette.testclient import TestClient

from api import guard
from api.context import Depot
from registry.db import SessionFactory, transaction
from registry.keys import create_key, revoke_key
from registry.tenants import default_tenant
from tests.api.conftest import bearer, refused

JSON = {"content-type": "application/json"}
JOBS = "/v1/fine_tuning/jobs"


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
        response = httpx.post(server + JOBS, content=b" " * 3_000_000, headers={**bearer(key), **JSON}, timeout=60)
        refused(response, 413, "body_too_large")

    def test_a_body_that_stops_arriving(self, server: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guard, "BODY_IDLE_SECONDS", 0.2)
        address = urlsplit(server)
        with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
            head = f"POST {JOBS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{").encode())
            answer = b""
            while b"}}" not in answer and (more := connection.recv(65536)):
                answer += more
        assert b" 408 " in answer.splitlines()[0]
        assert b"body_timeout" in answer

    def test_a_client_that_leaves_in_the_middle_is_no_error(
        self, server: str, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="api.requests")
        address = urlsplit(server)
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 99\r\n"
        with socket.create_connection((address.hostname, address.port), timeout=120) as connection:
            connection.sendall((head + "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x").encode())
        while not (lines := [r for r in caplog.records if r.getMessage() == "request"]):
            time.sleep(0.01)
        assert vars(lines[0])["status"] is None
        assert [r for r in caplog.records if r.levelno > logging.INFO and r.name.startswith(("api", "uvicorn"))] == []
