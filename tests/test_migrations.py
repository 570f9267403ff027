"""The schema exists only through Alembic: it goes up, down and up again, and the models agree with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, inspect, select, text

from registry.db import make_sessions
from registry.models import Base, Version
from tests.conftest import alembic_config
from tests.registry.jobs.helpers import claimed
from tests.registry.jobs.test_promote import promote, save


@pytest.fixture
def empty_url(database_url: str, engine: Engine) -> Iterator[str]:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE migrated"))
    yield database_url.replace("/depot?", "/migrated?")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE migrated WITH (FORCE)"))


def test_up_down_up_ends_where_it_began(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "head")
    command.downgrade(config, "base")
    engine = create_engine(empty_url)
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    assert inspect(engine).get_sequence_names() == []
    with engine.connect() as connection:
        ours = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        assert connection.execute(text(ours)).all() == []
    command.upgrade(config, "head")
    assert set(inspect(engine).get_table_names()) == {"alembic_version", *Base.metadata.tables}
    engine.dispose()


def test_a_downgrade_that_would_lose_versions_is_refused_before_it_changes_anything(empty_url: str) -> None:
    config = alembic_config(empty_url)
    command.upgrade(config, "head")
    engine = create_engine(empty_url)
    sessions = make_sessions(engine)
    job = claimed(sessions)
    promote(sessions, job, save(sessions, job))
    before = schema_of(engine)
    with pytest.raises(CommandError, match=r"Versions were published from checkpoints \(1\).* stay at 0009 or later"):
        command.downgrade(config, "base")
    assert schema_of(engine) == before
    with sessions() as session:
        assert session.scalars(select(Version.merge_recipe)).one()
    engine.dispose()


def schema_of(engine: Engine) -> tuple[list[str], list[tuple[str, str]]]:
    """The revision, and every column of every table."""
    columns = (
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
    )
    with engine.connect() as connection:
        revision = connection.scalars(text("SELECT version_num FROM alembic_version")).all()
        return list(revision), [(table, column) for table, column in connection.execute(text(columns))]


def test_models_and_migrations_agree(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_every_constraint_is_named_by_the_convention(engine: Engine) -> None:
    prefixes = {"c": "ck_", "f": "fk_", "p": "pk_", "u": "uq_"}
    query = """SELECT conname, contype::text FROM pg_constraint
               WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u')"""
    with engine.connect() as connection:
        names = connection.execute(text(query)).all()
    assert names
    strays = [n for n, kind in names if not n.startswith(prefixes[kind]) and not n.startswith("alembic_version")]
    assert strays == []


def test_alembic_reads_its_settings_in_any_locale() -> None:
    # It opens the file in the locale's encoding, which LC_ALL=C makes ASCII, Python's UTF-8 mode or not.
    assert (Path(__file__).parent.parent / "alembic.ini").read_bytes().isascii()
