"""Postgres stops, restarts, loses answers, ends sessions, or is behind a wire that swallows everything."""

import signal
from contextlib import suppress

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from registry.db import make_engine, make_sessions, transaction
from registry.models import Control, JobAttempt, Version
from tests.faults.checker import check
from tests.faults.site import Servers, Site, Wires
from worker.errors import is_outage

LONG = pytest.mark.faults_long
PUBLISHES = {"after": b"INSERT INTO versions", "to": b"COMMIT"}


def url_of(wires: Wires) -> str:
    return f"postgresql+psycopg://depot@127.0.0.1:{wires.postgres.port}/depot?sslmode=disable&gssencmode=disable"


@pytest.mark.parametrize("when", [pytest.param("idle", marks=LONG), "in a transaction"])
def test_a_connection_that_swallows_everything_fails_and_is_replaced(wires: Wires, when: str) -> None:
    engine = make_engine(url_of(wires), statement_timeout_ms=1000, pool_size=1)
    sessions = make_sessions(engine)
    with transaction(sessions) as session:
        session.execute(text("SELECT 1"))
    with pytest.raises(OperationalError) as caught, transaction(sessions) as session:
        if when != "idle":
            session.execute(text("SELECT 1"))
        wires.postgres.blackhole()
        session.execute(text("SELECT 1"))
    assert is_outage(caught.value)
    wires.heal()
    with transaction(sessions) as session:
        assert session.scalar(text("SELECT 2")) == 2
    engine.dispose()


def test_who_stops_within_a_transaction_does_not_keep_its_locks(servers: Servers) -> None:
    stopped = make_sessions(make_engine(servers.postgres.url, idle_timeout_ms=1000, pool_size=1))
    others = make_sessions(make_engine(servers.postgres.url, pool_size=1))
    lock = select(Control).with_for_update()
    taken = 0
    with pytest.raises(DBAPIError) as caught, transaction(stopped) as session:
        session.scalars(lock).one()
        with transaction(others) as other:
            other.scalars(lock).one()
            taken += 1
        session.scalars(lock).one()
    assert (taken, is_outage(caught.value)) == (1, True)
    with transaction(stopped) as session:
        session.scalars(lock).one()
    for sessions in (stopped, others):
        sessions.kw["bind"].dispose()


def test_a_statement_that_postgres_itself_ends_does_not_cost_the_connection(servers: Servers, wires: Wires) -> None:
    engine = make_engine(url_of(wires), statement_timeout_ms=1000, pool_size=1)
    with engine.connect() as connection:
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(OperationalError, match="statement timeout"):
            connection.execute(text("SELECT pg_sleep(10)"))
        connection.rollback()
        assert connection.scalar(text("SELECT pg_backend_pid()")) == pid
    engine.dispose()


def test_an_immediate_stop_of_postgres_costs_no_attempt(site: Site) -> None:
    jobs = [site.submit(steps=20, ms=50, seed=seed, adapter=f"bot-{seed}") for seed in (1, 2)]
    api = site.start_api()
    site.start_worker()
    with site.held():
        for job in jobs:
            site.wait_steps(job, 3)
        site.servers.stop_postgres()
    assert api.client.get("/v1/models").status_code == 503
    assert api.client.get("/healthz").status_code == 200
    site.servers.start_postgres()
    site.wait(lambda: api.client.get("/v1/models").status_code == 200, "the API is back")
    site.wait_ended(*jobs)
    check(site)
    assert [site.depot.job(job).attempt for job in jobs] == [1, 1]


@LONG
def test_an_outage_longer_than_the_lease_costs_no_attempt(site: Site) -> None:
    job = site.submit(steps=200, ms=50)
    site.start_worker()
    site.wait_steps(job, 3)
    trainers = site.workers[0].children()
    site.servers.stop_postgres(signal.SIGINT)
    signal.sigtimedwait([], 12)  # two leases
    site.servers.start_postgres()
    site.wait_ended(job)
    check(site)
    assert trainers
    assert site.depot.job(job).attempt == 1


def test_a_publication_whose_answer_is_lost_is_one_version(site: Site) -> None:
    job = site.submit()
    site.wires.postgres.lose_reply(**PUBLISHES)
    site.start_worker()
    site.wait_ended(job)
    assert site.wires.postgres.losses_left == 0
    check(site)
    assert site.depot.job(job).attempt == 1


def test_an_owner_that_dies_after_its_answer_was_lost_has_published(site: Site) -> None:
    job = site.submit()
    site.wires.postgres.lose_reply(**PUBLISHES)
    worker = site.start_worker()
    site.wait(lambda: site.wires.postgres.losses_left == 0, "the answer is lost")
    worker.kill()
    site.wait(lambda: site.state(job) == "succeeded", "Postgres did what it was asked for")
    site.start_worker()
    site.wait_ended(site.submit(seed=2, adapter="bot-2"))
    check(site)
    assert site.depot.job(job).attempt == 1


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (b"INSERT INTO checkpoints", "a checkpoint"),
        (b"INSERT INTO job_attempts", "a claim"),
        pytest.param(b"INSERT INTO blobs", "a blob", marks=LONG),
        pytest.param(b"lease_expires_at", "a heartbeat", marks=LONG),
        pytest.param(b"UPDATE outbox", "a wake-up", marks=LONG),
    ],
)
def test_a_commit_whose_answer_is_lost_counts_once(site: Site, after: bytes, what: str) -> None:
    job = site.submit(steps=20, ms=50)
    site.wires.postgres.lose_reply(after=after, to=b"COMMIT")
    site.start_worker()
    site.wait(lambda: site.wires.postgres.losses_left == 0, f"the answer about {what} is lost")
    site.wait_ended(job)
    check(site)


def test_a_session_ended_in_the_midst_of_a_publication_rolls_back_and_is_repeated(site: Site) -> None:
    job = site.submit()
    site.start_worker("pub.before_commit=sleep:2@1")
    site.wait(lambda: "failpoint pub.before_commit" in site.said(), "the transaction is open")
    site.end_sessions()
    site.wait_ended(job)
    check(site)
    assert (site.depot.job(job).attempt, site.count(Version.id.is_not(None))) == (1, 1)


@LONG
def test_a_wire_that_swallows_everything_for_a_while_costs_no_attempt(site: Site) -> None:
    job = site.submit(steps=80, ms=50)
    site.start_worker()
    site.wait_steps(job, 3)
    site.wires.postgres.blackhole()
    signal.sigtimedwait([], 5)
    site.wires.heal()
    site.wait_ended(job)
    check(site)
    assert site.depot.job(job).attempt == 1


@LONG
@pytest.mark.parametrize("fault", ["reset", "refuse", "slow", "cut"])
def test_a_bad_wire_to_postgres_loses_nothing(site: Site, fault: str) -> None:
    jobs = [site.submit(steps=20, ms=50, seed=seed, adapter=f"bot-{seed}") for seed in (1, 2)]
    wire = site.wires.postgres
    if fault == "cut":
        wire.cut_answers(*range(300, 6300, 200))
    elif fault == "slow":
        wire.delay(0.05)
    site.start_worker()
    site.wait_steps(jobs[0], 3)
    if fault == "refuse":
        wire.refuse()
        signal.sigtimedwait([], 2)
        wire.heal()
    elif fault == "reset":
        for _ in range(10):
            wire.reset()
            signal.sigtimedwait([], 0.3)
    site.wait_ended(*jobs)
    check(site)


def test_more_workers_than_connections_only_wait(site: Site) -> None:
    jobs = [site.submit(steps=5, seed=seed, adapter=f"bot-{seed}") for seed in range(4)]
    held = make_engine(site.servers.postgres.url, pool_size=200)
    api = site.start_api()
    worker = site.start_worker()
    connections: list[Connection] = []

    def take_all() -> bool:
        with suppress(OperationalError):
            while True:
                connections.append(held.connect())
        site.wires.postgres.reset()  # what this frees is taken in the next round
        return api.client.get("/v1/models").status_code == 503

    site.wait(take_all, "no connection is left to the API")
    for connection in connections:
        connection.close()
    held.dispose()
    site.wait_ended(*jobs)
    site.wait(lambda: api.client.get("/v1/models").status_code == 200, "the API is back")
    check(site)
    assert worker.alive
    assert site.count(JobAttempt.ended_at.is_(None)) == 0
