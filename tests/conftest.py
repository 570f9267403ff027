"""Real parts for every test: Postgres built by the migrations, Valkey, and a directory of objects."""

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cli.embedded.postgres import start_postgres
from cli.embedded.valkey import start_valkey
from registry.db import SessionFactory, make_engine, make_sessions
from registry.models import Base
from registry.storage.base import ObjectStore
from registry.storage.local import LocalStore

ROOT = Path(__file__).parent.parent
SECRET = secrets.token_bytes(32)
# What a fresh database holds from the migrations and tests must not empty.
SEEDED = {"job_transitions", "control"}

# The same examples every time; `pytest --hypothesis-profile=default` looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def alembic_config(url: str) -> Config:
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


@pytest.fixture(scope="session")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private Postgres at the newest migration, for the whole test run."""
    home = tmp_path_factory.mktemp("pg")
    settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300"}
    server = start_postgres(home / "data", home / "run", home / "postgres.log", settings=settings)
    try:
        command.upgrade(alembic_config(server.url), "head")
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="session")
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=60)  # more than any test has threads: none waits for one
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session whose work is rolled back: code under test may flush and even commit its savepoint."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
            yield session
        outer.rollback()


@pytest.fixture
def sessions(engine: Engine) -> Iterator[SessionFactory]:
    """Real commits, for races and for processes that look at the same database; emptied after the test."""
    yield make_sessions(engine)
    empty_database(engine)


def empty_database(engine: Engine) -> None:
    """Again where the last statement of a process that was killed a moment ago stands in the way: of the two, Postgres
    may end either."""
    tables = ", ".join(name for name in Base.metadata.tables if name not in SEEDED)
    for last in (False, False, True):
        try:
            with engine.begin() as connection:
                connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))
                connection.execute(text("UPDATE control SET reaper_tick = NULL, hold_until = NULL"))
        except OperationalError:
            if last:
                raise
        else:
            return


@pytest.fixture(autouse=True)
def same_torch() -> Iterator[None]:
    """Which tests a process ran before decides neither what torch is set to nor which numbers it draws."""
    torch = sys.modules.get("torch")
    before = torch and (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    if torch:
        torch.manual_seed(0)
    yield
    if torch and before:
        torch.set_num_threads(before[0])
        torch.set_default_dtype(before[1])
        torch.use_deterministic_algorithms(before[2])


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("valkey")
    server = start_valkey(home / "data", home / "run", home / "valkey.log")
    try:
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path / "objects", secret=SECRET, public_url="http://127.0.0.1:8321")
