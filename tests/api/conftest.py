"""The application over the real database and store, a client with a key, and rows that both tenants own."""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.main import create_app
from registry.blobs import store_file
from registry.db import SessionFactory, transaction
from registry.jobs.lease import claim
from registry.jobs.publish import publish_version
from registry.keys import create_key
from registry.settings import Settings
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from registry.tenants import default_tenant
from tests.factories import make_base_model, make_tenant

SECRET = "s" * 40
ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": f"A{n}"}]}).encode()
    + b"\n"
    for n in range(3)
)
BASE = "tiny-base"
WEIGHTS = bytes(range(256)) * 20
CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture
def settings(database_url: str, tmp_path: Path, sessions: SessionFactory) -> Settings:
    return Settings(
        database_url=database_url,
        store_url=f"file://{tmp_path}/objects",
        secret_key=SECRET,
        public_url="http://testserver",
        work_dir=tmp_path / "work",
        max_file_bytes=2_000_000,
        max_base_file_bytes=4_000_000,
    )


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings)
    yield app
    app.state.depot.engine.dispose()


@pytest.fixture
def key(sessions: SessionFactory) -> str:
    """A key of the default tenant, and a base model to train."""
    with transaction(sessions) as session:
        make_base_model(session, name=BASE)
        return create_key(session, tenant_id=default_tenant(session).id, name="test", pepper=SECRET.encode())


@pytest.fixture
def other_key(sessions: SessionFactory) -> str:
    """A key of another tenant."""
    with transaction(sessions) as session:
        return create_key(session, tenant_id=make_tenant(session).id, name="other", pepper=SECRET.encode())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def client(app: FastAPI, key: str) -> Iterator[TestClient]:
    with TestClient(app, headers=bearer(key), follow_redirects=False) as client:
        yield client


@pytest.fixture
def tenant_id(key: str, sessions: SessionFactory) -> uuid.UUID:
    with transaction(sessions) as session:
        return default_tenant(session).id


def upload(client: Any, data: bytes = ROWS, *, name: str = "rows.jsonl", purpose: str = "fine-tune") -> Any:
    return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})


@pytest.fixture
def file_id(client: TestClient) -> str:
    return upload(client).json()["id"]


@pytest.fixture
def submit(client: TestClient, file_id: str) -> Callable[..., Any]:
    """Submits a job; keywords replace fields of the body, None removes one."""

    def send(headers: dict[str, str] | None = None, **over: Any) -> Any:
        body = {"model": BASE, "training_file": file_id, "suffix": "support-bot", **over}
        body = {name: value for name, value in body.items() if value is not None}
        return client.post("/v1/fine_tuning/jobs", json=body, headers=headers)

    return send


def error_of(response: Any) -> dict[str, Any]:
    """The error in a response, which must have the one shape that all errors have."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["message"].strip()
    assert response.headers["x-request-id"].startswith("req_")
    return error


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["code"] == code, error
    return error


@pytest.fixture
def server(app: FastAPI, key: str) -> Iterator[str]:
    """The same application behind a real server on loopback; its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http="httptools", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60).raise_for_status()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=120)
    assert not thread.is_alive()


@pytest.fixture
def app_store(app: FastAPI) -> ObjectStore:
    """The store that the application uses."""
    return app.state.depot.store


@pytest.fixture
def put(
    sessions: SessionFactory, app_store: ObjectStore, tmp_path: Path, tenant_id: uuid.UUID
) -> Callable[..., uuid.UUID]:
    def put_bytes(data: bytes) -> uuid.UUID:
        path = tmp_path / uuid.uuid4().hex
        path.write_bytes(data)
        sha256, size = digest_file(path)
        return store_file(sessions, app_store, path, sha256=sha256, size=size, tenant_id=tenant_id)

    return put_bytes


@pytest.fixture
def publish(
    submit: Callable[..., Any], sessions: SessionFactory, put: Callable[..., uuid.UUID]
) -> Callable[..., dict[str, Any]]:
    """Submits a job and publishes what a worker would have made; the job object as it was submitted."""

    def publish_next(adapter: str = "bot") -> dict[str, Any]:
        job_json = submit(lora={"adapter": adapter, "r": 4}).json()
        files = {"adapter_config.json": put(CONFIG), "adapter_model.safetensors": put(WEIGHTS)}
        with transaction(sessions) as session:
            job = claim(session, queues=["default"], worker="w", lease_seconds=60)
            assert job is not None
        with transaction(sessions) as session:
            publish_version(
                session,
                job_id=job.id,
                fence=job.fence or 0,
                files=files,
                manifest={"files": [], "spec": job.spec},
                metrics={"train_loss": 1.5},
                trained_tokens=10,
            )
        return job_json

    return publish_next
