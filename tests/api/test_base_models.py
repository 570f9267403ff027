"""Base models, and everything that can be named as a model."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import BASE, refused, upload
from tests.tiny import make_base


class TestBaseModels:
    def upload_base(self, client: TestClient, directory: Path) -> dict[str, str]:
        return {
            path.name: upload(client, path.read_bytes(), name=path.name, purpose="base-model").json()["id"]
            for path in directory.iterdir()
        }

    def test_register_read_and_train_on_it(
        self, client: TestClient, tmp_path: Path, submit: Callable[..., Any]
    ) -> None:
        make_base(tmp_path / "base")
        files = self.upload_base(client, tmp_path / "base")
        response = client.post("/v1/base-models", json={"name": "org/tiny", "files": files})
        assert response.status_code == 201, response.text
        body = response.json()
        assert (body["name"], body["source"], body["architecture"]) == ("org/tiny", "upload", "llama")
        assert "q_proj" in body["linear_modules"]
        assert {f["path"] for f in body["files"]} == set(files)
        for address in ("/v1/base-models/org/tiny", "/v1/base-models/org%2Ftiny"):
            assert client.get(address).json() == body
        again = client.post("/v1/base-models", json={"name": "org/tiny", "files": files})
        assert again.json() == body
        names = [b["name"] for b in client.get("/v1/base-models").json()["data"]]
        assert names == sorted([BASE, "org/tiny"])
        assert submit(model="org/tiny", lora={"r": 2}).status_code == 200

    def test_files_must_be_uploads_for_a_base_model(self, client: TestClient, file_id: str) -> None:
        for text in (file_id, "/etc/passwd", f"file-{uuid.uuid4().hex}"):
            response = client.post("/v1/base-models", json={"name": "x", "files": {"config.json": text}})
            assert response.status_code == 422
            assert response.json()["error"]["param"] == "files.config.json"

    def test_what_is_no_model(self, client: TestClient) -> None:
        config = upload(client, b'{"model_type": "evil"}', name="config.json", purpose="base-model").json()["id"]
        response = client.post("/v1/base-models", json={"name": "x", "files": {"config.json": config}})
        refused(response, 422, "invalid_base_model")

    @pytest.mark.parametrize("name", ["../x", "a/b/c", "", "https://x"])
    def test_names_have_a_grammar(self, client: TestClient, name: str) -> None:
        refused(client.post("/v1/base-models", json={"name": name, "files": {}}), 422, "invalid_base_model_name")

    @pytest.mark.parametrize("field", ["endpoint", "bucket", "url", "trust_remote_code"])
    def test_no_place_is_taken_from_a_client(self, client: TestClient, field: str) -> None:
        response = client.post("/v1/base-models", json={"name": "x", "files": {}, field: "s3://x"})
        refused(response, 422, "unknown_field")


class TestModels:
    def test_list_and_read(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        publish()
        client.put("/v1/adapters/bot/aliases/production", json={"version": 1})
        body = client.get("/v1/models").json()
        assert [m["id"] for m in body["data"]] == [BASE, "bot@2"]
        assert client.get(f"/v1/models/{BASE}").json()["id"] == BASE
        assert client.get("/v1/models/bot@1").json()["id"] == "bot@1"
        assert client.get("/v1/models/bot@production").json()["id"] == "bot@1"
        for absent in ("bot", "bot@9", "x@1", "bot@"):
            refused(client.get(f"/v1/models/{absent}"), 404, "model_not_found")
