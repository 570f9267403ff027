"""Runs migrations on the database that DEPOT_DATABASE_URL names, one at a time, never waiting long for a lock."""

import os

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

from registry.models import Base

# Two migrators at once take turns on this lock; the number only has to be ours alone.
MIGRATION_LOCK = 7_104_113_110


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        _migrate(connection)
        return
    url = context.config.get_main_option("sqlalchemy.url") or os.environ.get("DEPOT_DATABASE_URL")
    if not url:
        raise SystemExit("Set DEPOT_DATABASE_URL to the database to migrate.")
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        _migrate(connection)
        connection.commit()


def _migrate(connection: Connection) -> None:
    connection.execute(text("SET lock_timeout = '10s'"))
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
    try:
        connection.commit()
        # All steps in one transaction: one that refuses, or fails, leaves the schema as it was before the first.
        context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
        connection.commit()


run()
