"""What must hold for every route: a permission, an example, a caller, and nobody else's things."""

import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import TypeAdapter
from sqlalchemy.orm import Session
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from api.depot import merge_schemas
from api.depot import schemas as depot_schemas
from api.documents import describe, example_of
from api.main import ROUTERS, create_app
from api.openai import schemas as openai_schemas
from api.openai.job_request import CREATE, JobCreate
from api.routing import GuardedRoute, Permission, permission_of, require_permissions
from registry.db import SessionFactory, transaction
from registry.ids import public_id
from registry.models import Checkpoint, CheckpointFile, Job, Merge, WebhookEndpoint
from registry.settings import Settings
from tests.api.conftest import bearer, refused
from tests.factories import make_adapter, make_blob, make_file, make_job, make_version

# A new route is a visible change here.
PERMISSIONS = """
DELETE /v1/adapters/{name}/aliases/{alias} adapters:write
DELETE /v1/adapters/{name}/versions/{version} adapters:write
DELETE /v1/files/{file_id} files:write
DELETE /v1/webhook_endpoints/{webhook_id} webhooks:write
GET /docs public
GET /healthz public
GET /openapi.json public
GET /readyz public
GET /v1/adapters adapters:read
GET /v1/adapters/{name} adapters:read
GET /v1/adapters/{name}/versions adapters:read
GET /v1/adapters/{name}/versions/{version} adapters:read
GET /v1/adapters/{name}/versions/{version}/files/{file:path} adapters:read
GET /v1/adapters/{name}/versions/{version}/merge-recipe merges:read
GET /v1/adapters/{name}/versions/{version}/merged merges:read
GET /v1/adapters/{name}/versions/{version}/merged/{file:path} merges:read
GET /v1/base-models base-models:read
GET /v1/base-models/{name:path} base-models:read
GET /v1/files files:read
GET /v1/files/{file_id} files:read
GET /v1/files/{file_id}/content files:read
GET /v1/fine_tuning/jobs jobs:read
GET /v1/fine_tuning/jobs/{job_id} jobs:read
GET /v1/fine_tuning/jobs/{job_id}/attempts jobs:read
GET /v1/fine_tuning/jobs/{job_id}/checkpoints jobs:read
GET /v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}/files/{file} adapters:read
GET /v1/fine_tuning/jobs/{job_id}/events jobs:read
GET /v1/fine_tuning/jobs/{job_id}/events/stream jobs:read
GET /v1/fine_tuning/jobs/{job_id}/metrics jobs:read
GET /v1/fine_tuning/jobs/{job_id}/queue jobs:read
GET /v1/merges/{merge_id} merges:read
GET /v1/merges/{merge_id}/files/{file:path} merges:read
GET /v1/models models:read
GET /v1/models/{model:path} models:read
GET /v1/objects/{token} public
GET /v1/webhook_endpoints webhooks:read
GET /v1/webhook_endpoints/event_types webhooks:read
GET /v1/webhook_endpoints/{webhook_id} webhooks:read
HEAD /v1/adapters/{name}/versions/{version}/merged/{file:path} merges:read
HEAD /v1/objects/{token} public
POST /v1/adapters/{name}/versions/{version}/merges merges:write
POST /v1/base-models base-models:write
POST /v1/files files:write
POST /v1/fine_tuning/jobs jobs:write
POST /v1/fine_tuning/jobs/{job_id}/cancel jobs:write
POST /v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint}/publish adapters:write
POST /v1/fine_tuning/jobs/{job_id}/pause jobs:write
POST /v1/fine_tuning/jobs/{job_id}/resume jobs:write
POST /v1/fine_tuning/jobs/{job_id}/retry jobs:write
POST /v1/webhook_endpoints webhooks:write
POST /v1/webhook_endpoints/{webhook_id} webhooks:write
POST /v1/webhook_endpoints/{webhook_id}/rotate_secret webhooks:write
POST /v1/webhook_endpoints/{webhook_id}/test webhooks:write
PUT /v1/adapters/{name}/aliases/{alias} adapters:write
"""


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    permission: str

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def declared_routes() -> Iterator[Route]:
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, GuardedRoute)
            permission = permission_of(route)
            assert permission is not None
            for method in route.methods:
                yield Route(method, route.path, permission.value)


ROUTES = sorted(declared_routes(), key=str)
PRIVATE = [route for route in ROUTES if route.permission != "public"]
WITH_IDS = [route for route in PRIVATE if "{" in route.path and "base-models" not in route.path]


def test_the_routes_and_their_permissions_are_these() -> None:
    assert sorted(f"{r} {r.permission}" for r in ROUTES) == PERMISSIONS.strip().splitlines()


def test_the_app_has_no_other_routes(app: FastAPI) -> None:
    found = {(m, c.path) for c in iter_route_contexts(app.routes) for m in (c.methods or {"?"})}
    assert found == {(route.method, route.path) for route in ROUTES}


class TestDeclaration:
    def test_a_route_without_permission_stops_the_start(self, app: FastAPI) -> None:
        app.add_route("/leak", lambda request: PlainTextResponse("secrets"))
        with pytest.raises(RuntimeError, match="/leak"), TestClient(app):
            pass

    def test_a_fastapi_route_without_permission_too(self, app: FastAPI) -> None:
        app.get("/leak")(lambda: "secrets")
        with pytest.raises(RuntimeError, match="/leak"):
            require_permissions(app)

    @pytest.mark.parametrize("kind", ["mount", "websocket"])
    def test_and_whatever_else_can_be_added(self, app: FastAPI, kind: str) -> None:
        if kind == "mount":
            app.mount("/leak", FastAPI())
        else:
            app.add_api_websocket_route("/leak", lambda websocket: None)
        with pytest.raises(RuntimeError, match="/leak"):
            require_permissions(app)

    def test_creation_itself_refuses(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastapi import APIRouter

        careless = APIRouter()
        careless.get("/leak")(lambda: "secrets")
        monkeypatch.setattr("api.main.ROUTERS", (*ROUTERS, careless))
        with pytest.raises(RuntimeError, match="/leak"):
            create_app(settings)

    def test_moving_an_alias_takes_the_same_permission_wherever_it_is_asked_for(self, app: FastAPI) -> None:
        schema = app.openapi()
        bodies = schema["components"]["schemas"]
        routes = [route for path in schema["paths"].values() for route in path.values()]
        needed = {name for route in routes for name in _body_of(route) if "alias" in bodies[name]["properties"]}
        assert needed == {"MergeIn"}
        for route in routes:
            if needed & set(_body_of(route)):
                assert route["x-field-permissions"] == {"alias": "adapters:write"}
        moves = [r for p, path in schema["paths"].items() for m, r in path.items() if "/aliases/" in p and m != "get"]
        assert moves
        assert {route["x-permission"] for route in moves} == {"adapters:write"}

    def test_permissions_are_words_that_exist(self) -> None:
        assert {route.permission for route in ROUTES} <= {p.value for p in Permission}


def _body_of(route: dict[str, Any]) -> list[str]:
    """Names of the schemas that a JSON body of this route may have."""
    schema = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return [part["$ref"].rpartition("/")[2] for part in [schema, *schema.get("anyOf", [])] if "$ref" in part]


def fill(path: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::path)?\}", lambda m: values[m[1]], path)


NOWHERE = {
    "file_id": f"file-{'0' * 32}",
    "job_id": f"ftjob-{'0' * 32}",
    "checkpoint": f"ftckpt-{'0' * 32}",
    "merge_id": f"merge-{'0' * 32}",
    "webhook_id": f"webhook-{'0' * 32}",
    "name": "absent",
    "version": "1",
    "alias": "production",
    "file": "adapter_config.json",
    "model": "absent@1",
}


@pytest.mark.parametrize("route", PRIVATE, ids=str)
class TestCaller:
    def test_no_key(self, client: TestClient, route: Route) -> None:
        del client.headers["Authorization"]
        response = client.request(route.method, fill(route.path, NOWHERE), content=b"{not json")
        refused_without_key(response, route)
        assert response.headers["www-authenticate"] == "Bearer"

    def test_the_key_is_read_from_one_place_only(self, client: TestClient, key: str, route: Route) -> None:
        del client.headers["Authorization"]
        response = client.request(
            route.method,
            fill(route.path, NOWHERE),
            params={"api_key": key, "access_token": key},
            headers={"Cookie": f"api_key={key}", "X-Api-Key": key, "X-Forwarded-User": "admin"},
        )
        refused_without_key(response, route)


def refused_without_key(response: Any, route: Route) -> None:
    assert response.status_code == 401
    if route.method != "HEAD":  # which has no body
        refused(response, 401, "missing_credentials")


@pytest.fixture
def theirs(client: TestClient, key: str, sessions: SessionFactory, tenant_id: uuid.UUID) -> dict[str, str]:
    """One of everything of the default tenant."""
    from registry.models import Tenant

    with transaction(sessions) as session:
        tenant = session.get_one(Tenant, tenant_id)
        adapter = make_adapter(session, tenant, name="mine")
        version = make_version(session, adapter)
        file = make_file(session, tenant)
        job = make_job(session, adapter, training_file_id=file.id)
        checkpoint = make_checkpoint(session, job)
        merge_job = make_job(session, adapter, state="succeeded", kind="merge")
        merge = Merge(tenant_id=tenant.id, version_id=version.id, dtype="base", job_id=merge_job.id)
        session.add(merge)
        session.flush()
        make_blob(session)
        url, events = "https://example.com/", ["fine_tuning.job.failed"]
        webhook = WebhookEndpoint(tenant_id=tenant.id, name="ci", url=url, event_types=events)
        session.add(webhook)
        session.flush()
        ids = {"file_id": file.id, "job_id": job.id, "merge_id": merge.id, "webhook_id": webhook.id}
        ids["checkpoint"] = checkpoint.id
    prefixes = {"file_id": "file", "job_id": "ftjob", "merge_id": "merge", "webhook_id": "webhook"}
    prefixes["checkpoint"] = "ftckpt"
    return {
        **{name: public_id(prefixes[name], value) for name, value in ids.items()},
        "name": "mine",
        "version": "1",
        "alias": "production",
        "file": "adapter_config.json",
        "model": "mine@1",
    }


def make_checkpoint(session: Session, job: Job) -> Checkpoint:
    """A checkpoint of the job, with an adapter of one file."""
    blob = make_blob(session)
    listed = [{"path": "adapter_config.json", "size": blob.size, "sha256": blob.sha256}]
    manifest = {"files": listed, "adapter": {"files": listed}}
    checkpoint = Checkpoint(job_id=job.id, fence=1, step=5, manifest=manifest, metrics={})
    session.add(checkpoint)
    session.flush()
    session.add(CheckpointFile(checkpoint_id=checkpoint.id, path="adapter_config.json", blob_id=blob.id))
    return checkpoint


def body_for(route: Route) -> dict[str, Any]:
    if route.path.endswith("/{webhook_id}/test"):
        return {"json": {"event_type": "fine_tuning.job.failed"}}
    if route.method == "POST" and route.path.endswith("/{webhook_id}"):
        return {"json": {"name": "other"}}
    return {"json": {"version": 1}} if route.method == "PUT" else {}


@pytest.mark.parametrize("route", WITH_IDS, ids=str)
def test_another_tenants_id_answers_like_none(
    client: TestClient, other_key: str, theirs: dict[str, str], route: Route
) -> None:
    client.headers.update(bearer(other_key))
    foreign = client.request(route.method, fill(route.path, theirs), **body_for(route))
    absent = client.request(route.method, fill(route.path, NOWHERE), **body_for(route))
    assert foreign.status_code == absent.status_code == 404
    assert foreign.content == absent.content


# The stream of a job that waits would not end within a test.
ANSWERED = [r for r in WITH_IDS if r.method == "GET" and "content" not in r.path and "stream" not in r.path]
# The bytes here are no model that could be merged.
ANSWERED = [r for r in ANSWERED if "/merged" not in r.path]


@pytest.mark.parametrize("route", ANSWERED, ids=str)
def test_the_owner_reaches_the_same_address(client: TestClient, theirs: dict[str, str], route: Route) -> None:
    response = client.request(route.method, fill(route.path, theirs))
    assert response.status_code in {200, 302} or response.json()["error"]["code"] == "artifact_not_found"


def test_lists_hold_nothing_of_others(client: TestClient, theirs: dict[str, str], other_key: str) -> None:
    for address in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters"):
        assert client.get(address).json()["data"]
        assert client.get(address, headers=bearer(other_key)).json()["data"] == []
    models = client.get("/v1/models", headers=bearer(other_key)).json()["data"]
    assert all("@" not in model["id"] for model in models)


class TestDocument:
    def operations(self, app: FastAPI) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, item in describe(app)["paths"].items():
            for method, operation in item.items():
                yield f"{method.upper()} {path}", operation

    def test_every_operation_is_described(self, app: FastAPI) -> None:
        for name, operation in self.operations(app):
            assert operation["summary"], name
            assert operation["description"], name
            assert operation["tags"], name
            assert operation["x-permission"], name

    def test_every_answer_has_an_example(self, app: FastAPI) -> None:
        for name, operation in self.operations(app):
            for status, answer in operation["responses"].items():
                if status == "302":
                    assert answer["headers"]["Location"]["example"], name
                    continue
                if status in ("204", "304"):
                    assert "content" not in answer, name
                    continue
                for content in answer["content"].values():
                    assert content.get("example") is not None or content.get("examples"), (name, status)

    def test_every_json_body_has_an_example(self, app: FastAPI) -> None:
        for name, operation in self.operations(app):
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                assert media == "multipart/form-data" or content["example"], name

    def test_error_examples_are_what_is_sent(self, app: FastAPI) -> None:
        for name, operation in self.operations(app):
            for status, answer in operation["responses"].items():
                examples = answer.get("content", {}).get("application/json", {}).get("examples", {})
                for code, example in examples.items():
                    assert example["value"]["error"]["code"] == code, name
                    assert int(status) >= 400, name

    @pytest.mark.parametrize(
        "model",
        [
            m
            for module in (openai_schemas, depot_schemas, merge_schemas)
            for m in vars(module).values()
            if isinstance(m, type) and "example" in (getattr(m, "model_config", {}).get("json_schema_extra") or {})
        ],
    )
    def test_examples_fit_their_models(self, model: Any) -> None:
        example = example_of(model)
        assert set(TypeAdapter(model).validate_python(example).model_dump()) == set(example)

    def test_the_example_job_is_one_that_could_run(self) -> None:
        assert JobCreate.model_validate(CREATE).spec().n_epochs == 3

    def test_fastapis_own_error_shape_is_nowhere(self, app: FastAPI) -> None:
        assert "HTTPValidationError" not in json.dumps(describe(app))

    def test_pages(self, client: TestClient) -> None:
        del client.headers["Authorization"]
        assert client.get("/openapi.json").json()["info"]["title"] == "LoRA Depot"
        assert "/openapi.json" in client.get("/docs").text
        assert client.get("/redoc").status_code == 404


def test_the_api_loads_neither_torch_nor_a_queue() -> None:
    program = (
        "import sys, api.main, api.admin\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'transformers', 'peft', 'celery', 'kombu', 'redis'}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
