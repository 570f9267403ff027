"""Postgres as it ships, and Valkey, for benchmarks; and a queue of any length."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import insert, text

from cli.embedded.postgres import start_postgres
from cli.embedded.valkey import start_valkey
from registry.db import make_engine, make_sessions, transaction
from registry.models import Base, Job
from tests.factories import make_adapter, make_base_model, make_tenant

ROOT = Path(__file__).parent.parent
PLENTY = 1_000_000


@contextmanager
def servers(folder: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a migrated Postgres with the settings it ships with, and of a Valkey."""
    postgres = start_postgres(folder / "pg", folder / "run", folder / "pg.log")
    try:
        valkey = start_valkey(folder / "valkey", folder / "run", folder / "valkey.log")
        try:
            config = Config(ROOT / "alembic.ini")
            config.set_main_option("sqlalchemy.url", postgres.url.replace("%", "%%"))
            command.upgrade(config, "head")
            yield postgres.url, valkey.url
        finally:
            valkey.stop()
    finally:
        postgres.stop()


def empty_and_fill(database: str, *, jobs: int, tenants: int) -> None:
    """Exactly `jobs` queued jobs, of `tenants` tenants that may run them all."""
    engine = make_engine(database, statement_timeout_ms=60_000)
    tables = ", ".join(name for name in Base.metadata.tables if name not in ("job_transitions", "control"))
    with engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))
    with transaction(make_sessions(engine)) as session:
        base = make_base_model(session)
        owners = [make_adapter(session, make_tenant(session, max_running=PLENTY), base) for _ in range(tenants)]
        rows = [
            {
                "tenant_id": owner.tenant_id,
                "kind": "train",
                "spec": {},
                "request": {},
                "adapter_id": owner.id,
                "base_model_id": base.id,
            }
            for owner in (owners[number % tenants] for number in range(jobs))
        ]
        session.execute(insert(Job), rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    engine.dispose()
