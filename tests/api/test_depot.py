"""Adapters, versions, aliases, merges, base models, and their downloads."""

import hashlib
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from registry.db import SessionFactory, transaction
from registry.jobs.fail import fail
from registry.jobs.lease import claim
from registry.jobs.publish import publish_merge
from registry.models import Tenant
from tests.api.conftest import BASE, CONFIG, WEIGHTS, refused
from tests.factories import make_adapter


class TestAdapters:
    def test_object(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        publish()
        client.put("/v1/adapters/bot/aliases/production", json={"version": 1})
        body = client.get("/v1/adapters/bot").json()
        assert body["created_at"] > 0
        del body["created_at"]
        assert body == {
            "object": "adapter",
            "name": "bot",
            "base_model": BASE,
            "latest_version": 2,
            "aliases": {"production": 1},
        }

    def test_search_and_pages(self, client: TestClient, sessions: SessionFactory, tenant_id: uuid.UUID) -> None:
        with transaction(sessions) as session:
            tenant = session.get_one(Tenant, tenant_id)
            for name in ("bot-a", "bot-b", "bot_c", "other"):
                make_adapter(session, tenant, name=name)
        first = client.get("/v1/adapters", params={"search": "BOT", "limit": 2}).json()
        assert [a["name"] for a in first["data"]] == ["bot-a", "bot-b"]
        assert (first["has_more"], first["last_id"]) == (True, "bot-b")
        second = client.get("/v1/adapters", params={"search": "BOT", "limit": 2, "after": "bot-b"}).json()
        assert [a["name"] for a in second["data"]] == ["bot_c"]
        assert client.get("/v1/adapters", params={"search": "_"}).json()["data"][0]["name"] == "bot_c"
        assert client.get("/v1/adapters", params={"search": "%"}).json()["data"] == []

    @pytest.mark.parametrize(("name", "after"), [("after", "absent"), ("after", "\u202e")])
    def test_foreign_cursor(self, client: TestClient, name: str, after: str) -> None:
        refused(client.get("/v1/adapters", params={name: after}), 400, "invalid_cursor")


class TestVersions:
    def test_object(self, client: TestClient, publish: Callable[..., Any], file_id: str) -> None:
        job = publish()
        body = client.get("/v1/adapters/bot/versions/1").json()
        assert (body["ref"], body["version"], body["adapter"], body["base_model"]) == ("bot@1", 1, "bot", BASE)
        assert body["job_id"] == job["id"]
        assert body["digest"].startswith("sha256:")
        assert body["lora"]["r"] == 4
        assert body["metrics"] == {"train_loss": 1.5}
        assert {(e["relation"], e["kind"], e["id"]) for e in body["lineage"]} == {
            ("based_on", "base_model", BASE),
            ("trained_on", "file", file_id),
        }
        assert body["files"] == [
            {"path": "adapter_config.json", "bytes": len(CONFIG), "sha256": hashlib.sha256(CONFIG).hexdigest()},
            {"path": "adapter_model.safetensors", "bytes": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
        ]

    def test_by_number_alias_and_latest(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        publish()
        client.put("/v1/adapters/bot/aliases/production", json={"version": 1})
        refs = {
            ref: client.get(f"/v1/adapters/bot/versions/{ref}").json() for ref in ("1", "v2", "latest", "production")
        }
        assert {ref: body["version"] for ref, body in refs.items()} == {"1": 1, "v2": 2, "latest": 2, "production": 1}
        assert refs["1"]["aliases"] == ["production"]

    def test_pages(self, client: TestClient, publish: Callable[..., Any]) -> None:
        for _ in range(3):
            publish()
        first = client.get("/v1/adapters/bot/versions", params={"limit": 2}).json()
        assert [v["version"] for v in first["data"]] == [3, 2]
        second = client.get("/v1/adapters/bot/versions", params={"limit": 2, "after": first["last_id"]}).json()
        assert [v["version"] for v in second["data"]] == [1]
        assert second["has_more"] is False
        for after in ("0", "9", "x", "9" * 30, "-1"):
            refused(client.get("/v1/adapters/bot/versions", params={"after": after}), 400, "invalid_cursor")

    def test_download_follows_a_signed_link(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        response = client.get("/v1/adapters/bot/versions/latest/files/adapter_model.safetensors")
        assert response.status_code == 302
        assert response.headers["x-depot-sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
        assert response.headers["x-depot-size"] == str(len(WEIGHTS))
        assert response.headers["cache-control"] == "no-store"
        anybody = TestClient(client.app)
        got = anybody.get(response.headers["location"])
        assert got.content == WEIGHTS
        assert 'filename="adapter_model.safetensors"' in got.headers["content-disposition"]

    @pytest.mark.parametrize("file", ["nope", "../x", "a/b/c", "adapter_config.json/x"])
    def test_absent_file(self, client: TestClient, publish: Callable[..., Any], file: str) -> None:
        publish()
        assert client.get(f"/v1/adapters/bot/versions/1/files/{file}").status_code == 404

    def test_delete_burns_the_number(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        publish()
        assert client.delete("/v1/adapters/bot/versions/2").json() == {
            "object": "adapter.version",
            "ref": "bot@2",
            "deleted": True,
        }
        refused(client.get("/v1/adapters/bot/versions/2"), 404, "version_not_found")
        publish()
        assert client.get("/v1/adapters/bot/versions/latest").json()["version"] == 3

    def test_an_aliased_version_stays(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        client.put("/v1/adapters/bot/aliases/production", json={"version": 1})
        error = refused(client.delete("/v1/adapters/bot/versions/1"), 409, "version_in_use")
        assert error["details"]["aliases"] == ["production"]


class TestAliases:
    def test_set_move_and_remove(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        publish()
        address = "/v1/adapters/bot/aliases/production"
        assert client.put(address, json={"version": 1}).json() == {
            "object": "adapter.alias",
            "adapter": "bot",
            "alias": "production",
            "version": 1,
        }
        assert client.put(address, json={"version": 2}).json()["version"] == 2
        assert client.delete(address).json()["deleted"] is True
        refused(client.delete(address), 404, "alias_not_found")

    @pytest.mark.parametrize("alias", ["latest", "v7", "12"])
    def test_reserved(self, client: TestClient, publish: Callable[..., Any], alias: str) -> None:
        publish()
        refused(client.put(f"/v1/adapters/bot/aliases/{alias}", json={"version": 1}), 422, "alias_reserved")

    @pytest.mark.parametrize("body", [{"version": True}, {"version": "1"}, {"version": 1.0}])
    def test_version_is_an_integer(self, client: TestClient, publish: Callable[..., Any], body: Any) -> None:
        publish()
        refused(client.put("/v1/adapters/bot/aliases/x", json=body), 422, "invalid_type")

    @pytest.mark.parametrize("version", [0, -1, 2, 10**40])
    def test_absent_version(self, client: TestClient, publish: Callable[..., Any], version: int) -> None:
        publish()
        refused(client.put("/v1/adapters/bot/aliases/x", json={"version": version}), 404, "version_not_found")


class TestMerges:
    def test_once_per_version_and_dtype(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        address = "/v1/adapters/bot/versions/1/merges"
        first, again, other = (
            client.post(address),
            client.post(address, json={"dtype": "base"}),
            client.post(address, json={"dtype": "float16"}),
        )
        assert [r.status_code for r in (first, again, other)] == [202, 200, 202]
        assert first.json()["id"] == again.json()["id"] != other.json()["id"]
        assert (first.json()["status"], first.json()["dtype"]) == ("queued", "base")

    def test_options_make_a_merge_of_their_own(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        address, options = "/v1/adapters/bot/versions/1/merges", {"scale": 0.5, "shard_size": 2**20}
        plain, first, again = (client.post(address, json=body) for body in ({}, options, options))
        assert [response.status_code for response in (plain, first, again)] == [202, 202, 200]
        assert first.json()["id"] == again.json()["id"] != plain.json()["id"]
        assert {name: first.json()[name] for name in options} == options
        assert (plain.json()["scale"], plain.json()["shard_size"]) == (1.0, None)

    def test_an_alias_waits_for_the_merge(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        address = "/v1/adapters/bot/versions/1/merges"
        asked = client.post(address, json={"alias": "production"})
        assert (asked.status_code, asked.json()["aliases"]) == (202, ["production"])
        again = client.post(address, json={"alias": "stable"})
        assert (again.status_code, again.json()["aliases"]) == (200, ["production", "stable"])
        assert client.get("/v1/adapters/bot").json()["aliases"] == {}

    @pytest.mark.parametrize(
        ("alias", "code"),
        [("latest", "alias_reserved"), ("v7", "alias_reserved"), ("A b", "invalid_alias_name"), (7, "invalid_type")],
    )
    def test_a_bad_alias_is_refused_before_anything_is_queued(
        self, client: TestClient, publish: Callable[..., Any], alias: Any, code: str
    ) -> None:
        publish()
        address = "/v1/adapters/bot/versions/1/merges"
        assert refused(client.post(address, json={"alias": alias}), 422, code)["param"] == "alias"
        assert client.post(address).status_code == 202  # it is the first

    @pytest.mark.parametrize("options", [{"scale": 101}, {"shard_size": 1}, {"shard_size": 2**41}, {"start": "int8"}])
    def test_options_have_bounds(
        self, client: TestClient, publish: Callable[..., Any], options: dict[str, Any]
    ) -> None:
        publish()
        refused(client.post("/v1/adapters/bot/versions/1/merges", json=options), 422, "invalid_value")

    def test_dtype_is_one_that_exists(self, client: TestClient, publish: Callable[..., Any]) -> None:
        publish()
        error = refused(client.post("/v1/adapters/bot/versions/1/merges", json={"dtype": "int4"}), 422, "invalid_value")
        assert "bfloat16" in error["message"]

    def test_files_appear_when_it_has_succeeded(
        self, client: TestClient, publish: Callable[..., Any], sessions: SessionFactory, put: Callable[..., uuid.UUID]
    ) -> None:
        publish()
        merge = client.post("/v1/adapters/bot/versions/1/merges").json()
        file = f"/v1/merges/{merge['id']}/files/model.safetensors"
        refused(client.get(file), 409, "merge_not_ready")
        blob = put(WEIGHTS)
        with transaction(sessions) as session:
            job = claim(session, queues=["default"], worker="w", lease_seconds=60)
            assert job is not None
        assert client.get(f"/v1/merges/{merge['id']}").json()["status"] == "running"
        with transaction(sessions) as session:
            files = {"model.safetensors": blob}
            publish_merge(session, job_id=job.id, fence=job.fence or 0, files=files, digest="0" * 64, report={"n": 1})
        done = client.get(f"/v1/merges/{merge['id']}").json()
        assert (done["status"], done["digest"], done["report"]) == ("succeeded", "sha256:" + "0" * 64, {"n": 1})
        assert [f["path"] for f in done["files"]] == ["model.safetensors"]
        assert client.get(client.get(file).headers["location"]).content == WEIGHTS

    def test_a_failed_merge_says_why_and_may_be_asked_for_again(
        self, client: TestClient, publish: Callable[..., Any], sessions: SessionFactory
    ) -> None:
        publish()
        merge = client.post("/v1/adapters/bot/versions/1/merges").json()
        with transaction(sessions) as session:
            job = claim(session, queues=["default"], worker="w", lease_seconds=60)
            assert job is not None
        with transaction(sessions) as session:
            fail(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                error_class="user",
                code="not_finite",
                message="NaN",
                max_infra_failures=1,
            )
        body = client.get(f"/v1/merges/{merge['id']}").json()
        assert (body["status"], body["error"]) == ("failed", {"code": "not_finite", "message": "NaN"})
        assert client.post("/v1/adapters/bot/versions/1/merges").status_code == 202
