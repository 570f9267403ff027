"""Engine, sessions and the declarative base. SQL stops in this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, MetaData, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

ANSWER_MARGIN_SECONDS = 5.0  # for the answer of a statement that ran into its own timeout

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


class BoundedConnection(psycopg.Connection[Any]):
    """A connection on which no answer is waited for longer than `answer_seconds`; then it is closed, and useless.

    Timeouts of Postgres need a Postgres that runs, and those of TCP a host that is gone: a server that was stopped, or
    a proxy that swallows everything, is neither."""

    answer_seconds: float

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        try:
            return super().wait(gen, interval, self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise


def make_engine(
    url: str, *, statement_timeout_ms: int = 10_000, idle_timeout_ms: int = 60_000, pool_size: int = 10
) -> Engine:
    """An engine whose sockets and statements give up: a hung connection must fail before a lease does.

    The locks of a client that stopped within a transaction, or whose host is gone, are free after `idle_timeout_ms`."""
    options = f"-c statement_timeout={statement_timeout_ms} -c lock_timeout=5000 -c timezone=UTC"
    options += f" -c idle_in_transaction_session_timeout={idle_timeout_ms}"
    engine = create_engine(
        url,
        pool_pre_ping=True,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=5,
        connect_args={
            "options": options,
            "connect_timeout": 5,
            "keepalives_idle": 10,
            "tcp_user_timeout": 20_000,
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: object, _record: object, words: list[Any], options: dict[str, Any]) -> BoundedConnection:
        connection = BoundedConnection.connect(*words, **options)
        connection.answer_seconds = statement_timeout_ms / 1000 + ANSWER_MARGIN_SECONDS
        return connection

    return engine


SessionFactory = sessionmaker[Session]


def make_sessions(engine: Engine) -> SessionFactory:
    return sessionmaker(engine, expire_on_commit=False)


@contextmanager
def transaction(sessions: SessionFactory) -> Iterator[Session]:
    """One unit of work: commits when the block returns, rolls back when it raises."""
    with sessions() as session, session.begin():
        yield session
