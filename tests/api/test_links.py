"""Signed download links of the local app_store."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.conftest import CONFIG, refused


class TestLinks:
    @pytest.fixture
    def token(self, client: TestClient, publish: Callable[..., Any]) -> str:
        publish()
        link = client.get("/v1/adapters/bot/versions/1/files/adapter_config.json").headers["location"]
        return link.rpartition("/")[2]

    def test_head_and_ranges(self, client: TestClient, token: str) -> None:
        head = client.head(f"/v1/objects/{token}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(CONFIG))
        part = client.get(f"/v1/objects/{token}", headers={"Range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, CONFIG[2:6])
        assert part.headers["content-range"] == f"bytes 2-5/{len(CONFIG)}"
        beyond = client.get(f"/v1/objects/{token}", headers={"Range": "bytes=999-"})
        refused(beyond, 416, "range_not_satisfiable")

    def test_a_changed_token_opens_nothing(self, client: TestClient, token: str) -> None:
        for changed in (token[:-1] + ("0" if token[-1] != "0" else "1"), "x" + token, token.partition(".")[0], "x"):
            refused(client.get(f"/v1/objects/{changed}"), 403, "link_invalid")

    def test_an_expired_token_opens_nothing(self, client: TestClient, token: str, app_store: Any) -> None:
        key, filename = app_store.open_link(token, now=0)
        old = app_store.link(key, filename=filename, seconds=-1).rpartition("/")[2]
        refused(client.get(f"/v1/objects/{old}"), 403, "link_expired")

    def test_a_removed_object_is_not_found(self, client: TestClient, token: str, app_store: Any) -> None:
        key, _ = app_store.open_link(token, now=0)
        app_store.delete(key)
        refused(client.get(f"/v1/objects/{token}"), 404, "artifact_not_found")

    def test_response_headers_cannot_be_chosen_by_the_link(self, client: TestClient, token: str) -> None:
        response = client.get(f"/v1/objects/{token}", params={"response-content-type": "text/html"})
        refused(response, 422, "unknown_parameter")
