"""A depot behind a wire that breaks, and the commands on it."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from registry.db import SessionFactory, transaction
from registry.keys import create_key
from registry.settings import Settings
from registry.storage.local import LocalStore
from registry.tenants import default_tenant
from tests.cli.live import Depot, Wire, serve, start
from tests.factories import make_base_model
from tests.tiny import make_base, make_rows, write_jsonl

SECRET = "s" * 40


@pytest.fixture
def depot(database_url: str, tmp_path: Path, sessions: SessionFactory) -> Iterator[Depot]:
    """A depot with the base model "tiny"; everything, downloads too, passes its wire."""
    listener = socket.create_server(("127.0.0.1", 0))
    wire = Wire(listener.getsockname())
    settings = Settings(
        database_url=database_url,
        store_url=f"file://{tmp_path}/objects",
        secret_key=SECRET,
        public_url=wire.url,
        work_dir=tmp_path / "work",
    )
    with transaction(sessions) as session:
        make_base_model(session, name="tiny")
        key = create_key(session, tenant_id=default_tenant(session).id, name="test", pepper=SECRET.encode())
    store = LocalStore(tmp_path / "objects", secret=SECRET.encode(), public_url=wire.url)
    start(wire.run)
    with serve(settings, listener):
        yield Depot(wire.url, key, wire, sessions, store, tmp_path)
    wire.listener.close()


Run = Callable[..., Any]


@pytest.fixture
def run(depot: Depot) -> Run:
    """`lora-depot …`; the result, whose exit status must be `status`."""

    def call(*arguments: str, status: int = 0, **env: str) -> Any:
        result = CliRunner().invoke(app, list(arguments), env={**depot.env, **env})
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.output
        return result

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tiny") / "base", shards=3)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "Support Bot.jsonl", make_rows(8)))
