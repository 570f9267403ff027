"""Uploading, listing, reading and deleting files."""

import hashlib
import json
import logging
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from api.openai.files import bounded_lines
from lora_core.rows import MAX_LINE_BYTES
from registry.db import SessionFactory, transaction
from registry.models import Blob
from tests.api.conftest import BASE, ROWS, refused, upload


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


class TestUpload:
    def test_answers_with_the_file_object(self, client: TestClient) -> None:
        response = upload(client)
        assert response.status_code == 200
        body = response.json()
        assert body["object"] == "file"
        assert body["id"].startswith("file-")
        assert (body["bytes"], body["filename"], body["purpose"]) == (len(ROWS), "rows.jsonl", "fine-tune")
        assert body["sha256"] == hashlib.sha256(ROWS).hexdigest()
        assert body["status"] == "processed"
        assert body["report"] == {"rows": 3, "kind": "messages"}

    def test_purpose_may_follow_the_file(self, client: TestClient) -> None:
        boundary = "XX"
        parts = (
            b'--XX\r\nContent-Disposition: form-data; name="file"; filename="r.jsonl"\r\n\r\n' + ROWS + b"\r\n"
            b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--XX--\r\n'
        )
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        assert client.post("/v1/files", content=parts, headers=headers).status_code == 200

    def test_nothing_stays_in_the_spool(self, client: TestClient, tmp_path: Path) -> None:
        upload(client)
        upload(client, b"bad\n")
        assert list((tmp_path / "work" / "uploads").iterdir()) == []

    def test_a_file_larger_than_a_write_arrives_whole(self, client: TestClient) -> None:
        data = bytes(range(256)) * 10_000
        body = upload(client, data, name="model.safetensors", purpose="base-model").json()
        assert client.get(f"/v1/files/{body['id']}/content").content == data

    def test_bad_rows_are_named_by_line(self, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
        good = {"prompt": "a", "completion": "b"}
        bad = lines(good, b"{not json", {"prompt": "a"}, good)
        error = refused(upload(client, bad), 422, "invalid_training_file")
        assert "line 2" in error["message"]
        assert error["param"] == "file"
        assert [e["line"] for e in error["details"]["errors"]] == [2, 3]
        assert all(record.exc_info is None for record in caplog.records)

    def test_at_most_twenty_bad_rows_are_listed(self, client: TestClient) -> None:
        error = refused(upload(client, b"x\n" * 50), 422, "invalid_training_file")
        assert len(error["details"]["errors"]) == 20

    @pytest.mark.parametrize(
        "data", [b"", b"\n\n", b"[1]", b"\x80\x04pickle", b'{"prompt": "a\\u0000", "completion": "b"}']
    )
    def test_what_cannot_be_trained_on_is_refused(self, client: TestClient, data: bytes) -> None:
        refused(upload(client, data), 422, "invalid_training_file")

    def test_a_refused_file_leaves_no_blob(self, client: TestClient, sessions: SessionFactory) -> None:
        upload(client, b"x\n")
        with transaction(sessions) as session:
            assert [blob for blob in session.scalars(select(Blob)) if blob.tenant_id is not None] == []

    def test_too_large_for_its_purpose(self, client: TestClient) -> None:
        error = refused(upload(client, b"x" * 2_000_001), 413, "file_too_large")
        assert error["details"]["limit_bytes"] == 2_000_000

    def test_too_large_for_any_purpose(self, client: TestClient) -> None:
        refused(upload(client, b"x" * 5_000_000, purpose="base-model"), 413, "body_too_large")

    def test_unknown_purpose(self, client: TestClient) -> None:
        error = refused(upload(client, purpose="batch"), 422, "invalid_value")
        assert "fine-tune, base-model" in error["message"]

    def test_unknown_form_field(self, client: TestClient) -> None:
        response = client.post(
            "/v1/files", files={"file": ("a", ROWS)}, data={"purpose": "fine-tune", "tenant_id": "x"}
        )
        assert refused(response, 422, "unknown_field")["param"] == "tenant_id"

    def test_missing_parts(self, client: TestClient) -> None:
        assert (
            refused(client.post("/v1/files", files={"file": ("a", ROWS)}), 422, "missing_field")["param"] == "purpose"
        )
        only_purpose = client.post("/v1/files", files={"purpose": (None, "fine-tune")})
        assert refused(only_purpose, 422, "missing_field")["param"] == "file"

    def test_two_files_are_refused(self, client: TestClient) -> None:
        files = [("file", ("a", ROWS)), ("file", ("b", ROWS))]
        refused(client.post("/v1/files", files=files, data={"purpose": "fine-tune"}), 400, "invalid_multipart")

    def test_not_multipart(self, client: TestClient) -> None:
        refused(client.post("/v1/files", json={"purpose": "fine-tune"}), 415, "unsupported_media_type")

    def test_broken_multipart(self, client: TestClient) -> None:
        headers = {"content-type": "multipart/form-data; boundary=XX"}
        refused(client.post("/v1/files", content=b"nonsense", headers=headers), 400, "invalid_multipart")

    @pytest.mark.parametrize("name", ["../../etc/passwd", "a\x07b", "x" * 300])
    def test_dangerous_filename(self, client: TestClient, name: str) -> None:
        content = (
            f'--XX\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode() + ROWS + b"\r\n"
            b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--XX--\r\n'
        )
        headers = {"content-type": "multipart/form-data; boundary=XX"}
        response = client.post("/v1/files", content=content, headers=headers)
        if response.status_code == 200:  # the parser kept the last part of a path only
            assert "/" not in response.json()["filename"]
        else:
            assert 400 <= response.status_code < 500


def test_one_endless_line_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"a" * (3 * MAX_LINE_BYTES) + b"\nlast\n")
    with path.open("rb") as source:
        found = list(bounded_lines(source))
    assert len(found) == 2
    assert MAX_LINE_BYTES < len(found[0]) <= MAX_LINE_BYTES + 2
    assert found[1] == b"last\n"


class TestList:
    def test_pages_visit_every_file_once(self, client: TestClient) -> None:
        made = [upload(client).json()["id"] for _ in range(3)]
        seen, after = [], None
        while True:
            page = client.get("/v1/files", params={"limit": 2, **({"after": after} if after else {})}).json()
            seen += [file["id"] for file in page["data"]]
            assert page["first_id"] == page["data"][0]["id"]
            assert page["last_id"] == page["data"][-1]["id"]
            after = page["last_id"]
            if not page["has_more"]:
                break
        assert seen == made[::-1]

    def test_order_and_purpose(self, client: TestClient) -> None:
        first, second = upload(client).json()["id"], upload(client, b"x", purpose="base-model").json()["id"]
        ids = [f["id"] for f in client.get("/v1/files", params={"order": "asc"}).json()["data"]]
        assert ids == [first, second]
        only = client.get("/v1/files", params={"purpose": "base-model"}).json()["data"]
        assert [f["id"] for f in only] == [second]

    def test_empty(self, client: TestClient) -> None:
        body = client.get("/v1/files").json()
        assert body == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}

    @pytest.mark.parametrize("limit", ["0", "-1", "1000000000", "abc", "1.5", ""])
    def test_limit_out_of_range(self, client: TestClient, limit: str) -> None:
        assert refused(client.get("/v1/files", params={"limit": limit}), 422, "invalid_limit")["param"] == "limit"

    @pytest.mark.parametrize(
        "after", ["x", "file-" + "0" * 31, f"ftjob-{uuid.UUID(int=7).hex}", f"file-{uuid.UUID(int=7).hex}"]
    )
    def test_foreign_cursor(self, client: TestClient, after: str) -> None:
        refused(client.get("/v1/files", params={"after": after}), 400, "invalid_cursor")

    @pytest.mark.parametrize("name", ["tenant_id", "order_by", "api_key"])
    def test_unknown_parameter(self, client: TestClient, name: str) -> None:
        assert refused(client.get("/v1/files", params={name: "x"}), 422, "unknown_parameter")["param"] == name


class TestContent:
    def test_whole_file(self, client: TestClient, file_id: str) -> None:
        response = client.get(f"/v1/files/{file_id}/content")
        assert response.content == ROWS
        assert response.headers["content-length"] == str(len(ROWS))
        assert response.headers["content-disposition"].startswith("attachment;")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-type"] == "application/octet-stream"

    @pytest.mark.parametrize(
        ("value", "start", "end"),
        [
            ("bytes=0-0", 0, 1),
            ("bytes=5-9", 5, 10),
            ("bytes=10-", 10, None),
            ("bytes=-7", -7, None),
            ("bytes=3-99999999999999999999", 3, None),
            ("bytes=-99999999", 0, None),
        ],
    )
    def test_one_range(self, client: TestClient, file_id: str, value: str, start: int, end: int | None) -> None:
        response = client.get(f"/v1/files/{file_id}/content", headers={"Range": value})
        assert response.status_code == 206
        assert response.content == ROWS[start:end]
        first = start % len(ROWS)
        assert response.headers["content-range"] == f"bytes {first}-{first + len(response.content) - 1}/{len(ROWS)}"

    def test_range_behind_the_end(self, client: TestClient, file_id: str) -> None:
        response = client.get(f"/v1/files/{file_id}/content", headers={"Range": f"bytes={len(ROWS)}-"})
        refused(response, 416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{len(ROWS)}"

    @pytest.mark.parametrize(
        "value", ["bytes=5-2", "bytes=abc", "items=0-1", "bytes=-", "bytes=" + "1" * 70 + "-", "x"]
    )
    def test_range_that_is_none(self, client: TestClient, file_id: str, value: str) -> None:
        refused(client.get(f"/v1/files/{file_id}/content", headers={"Range": value}), 400, "invalid_range")

    def test_range_of_another_version_gets_everything(self, client: TestClient, file_id: str) -> None:
        headers = {"Range": "bytes=0-0", "If-Range": '"something else"'}
        assert client.get(f"/v1/files/{file_id}/content", headers=headers).content == ROWS

    def test_corrupt_bytes_never_arrive_whole(
        self, client: TestClient, file_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (stored,) = [p for p in (tmp_path / "objects" / "blobs").rglob("*") if p.is_file()]
        stored.chmod(0o600)
        stored.write_bytes(ROWS[:-2] + b"!\n")
        response = client.get(f"/v1/files/{file_id}/content")
        assert len(response.content) < len(ROWS)
        assert any(r.message == "response broken off" and r.reason == "artifact_corrupt" for r in caplog.records)

    def test_bytes_of_another_length_are_not_started(
        self, client: TestClient, file_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (stored,) = [p for p in (tmp_path / "objects" / "blobs").rglob("*") if p.is_file()]
        stored.chmod(0o600)
        stored.write_bytes(ROWS[:-1])
        response = client.get(f"/v1/files/{file_id}/content")
        refused(response, 500, "artifact_corrupt")
        (told,) = [r for r in caplog.records if r.message == "request failed"]
        assert (told.code, told.request_id) == ("artifact_corrupt", response.headers["x-request-id"])


class TestDelete:
    def test_a_deleted_file_is_gone(self, client: TestClient, file_id: str) -> None:
        assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
        refused(client.get(f"/v1/files/{file_id}"), 404, "file_not_found")
        refused(client.delete(f"/v1/files/{file_id}"), 404, "file_not_found")

    def test_a_queued_job_keeps_its_file(self, client: TestClient, file_id: str) -> None:
        body = {"model": BASE, "training_file": file_id, "suffix": "bot"}
        assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
        response = client.delete(f"/v1/files/{file_id}")
        refused(response, 409, "file_in_use")
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("bad", ["nonsense", "file-zz", f"file-{uuid.UUID(int=7)}", "FILE-" + "0" * 32])
def test_malformed_id_is_not_found(client: TestClient, bad: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for address in (f"/v1/files/{bad}", f"/v1/files/{bad}/content"):
        refused(client.get(address), 404, "file_not_found")
    assert all(record.exc_info is None for record in caplog.records)
