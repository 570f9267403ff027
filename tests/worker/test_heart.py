"""What a worker may believe while Postgres is away, and what it may not do."""

import threading
import time
import uuid

import pytest
from sqlalchemy.event import listen
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.errors import CancelRequested, FenceLost
from registry.jobs.lease import claim
from tests.worker.depot import Depot, wait_until
from worker.attempt import Attempt, Stop
from worker.errors import Drained
from worker.heart import Heart
from worker.publish import conclude


class Switch:
    """Sessions that can be made to fail like those of a database that went away."""

    def __init__(self, sessions: SessionFactory) -> None:
        self._sessions = sessions
        self.away = False
        self.deaf = False
        self.refused = 0

    def __call__(self) -> Session:
        if self.away:
            self.refused += 1
            raise OperationalError("SELECT 1", {}, ConnectionRefusedError())
        session = self._sessions()
        if self.deaf:
            listen(session, "after_commit", lose_answer)
        return session


def lose_answer(_session: Session) -> None:
    raise OperationalError("COMMIT", {}, ConnectionResetError())


@pytest.fixture
def switch(depot: Depot) -> Switch:
    return Switch(depot.sessions)


@pytest.fixture
def attempt(depot: Depot) -> Attempt:
    depot.submit()
    with transaction(depot.sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
    assert job is not None
    assert job.fence is not None
    return Attempt(job_id=job.id, tenant_id=job.tenant_id, fence=job.fence)


def make_heart(attempt: Attempt, switch: Switch) -> Heart:
    return Heart(attempt, switch, lease_seconds=60, heartbeat_seconds=0.05)  # type: ignore[arg-type]


def test_nothing_is_published_while_nobody_knows_who_owns_the_job(attempt: Attempt, switch: Switch) -> None:
    heart = make_heart(attempt, switch)
    heart.start()
    published = threading.Event()
    switch.away = True
    wait_until(lambda: switch.refused)  # so no beat is on its way
    attempt.trust(time.monotonic())  # as if a lease had passed since the last one
    writer = threading.Thread(target=lambda: conclude(attempt, heart, published.set))
    writer.start()
    before = switch.refused
    wait_until(lambda: switch.refused > before + 3)
    assert not published.is_set()
    switch.away = False
    writer.join()
    assert published.is_set()
    assert attempt.is_trusted()
    heart.stop()


def test_a_slow_publish_asks_again_before_it_writes(attempt: Attempt, switch: Switch) -> None:
    heart = make_heart(attempt, switch)
    writes: list[bool] = []

    def return_after_a_refusal() -> None:
        wait_until(lambda: switch.refused)
        switch.away = False

    def publish() -> None:
        writes.append(attempt.is_trusted())
        if len(writes) == 1:
            switch.away = True  # the commit's answer was lost together with the database
            attempt.trust(time.monotonic())
            threading.Thread(target=return_after_a_refusal).start()
            raise OperationalError("COMMIT", {}, ConnectionResetError())

    conclude(attempt, heart, publish)
    assert writes == [True, True]


def test_events_of_an_outage_arrive_after_it_in_order(depot: Depot, attempt: Attempt, switch: Switch) -> None:
    heart = make_heart(attempt, switch)
    switch.away = True
    attempt.news.note("first")
    with pytest.raises(OperationalError):
        heart.beat()
    attempt.news.note("second")
    switch.away = False
    heart.beat()
    told = [event.message for event in depot.events(attempt.job_id) if event.type == "message"]
    assert told == ["first", "second"]


def test_events_whose_delivery_was_not_acknowledged_are_told_once(
    depot: Depot, attempt: Attempt, switch: Switch
) -> None:
    heart = make_heart(attempt, switch)
    attempt.news.note("first")
    heart.beat()
    attempt.news.note("second")
    switch.deaf = True
    with pytest.raises(OperationalError):
        heart.beat()
    attempt.news.note("third")
    switch.deaf = False
    heart.beat()
    heart.beat()
    told = [event.message for event in depot.events(attempt.job_id) if event.type == "message"]
    assert told == ["first", "second", "third"]


def test_a_lost_fence_stops_the_attempt(depot: Depot, attempt: Attempt, switch: Switch) -> None:
    stranger = Attempt(job_id=attempt.job_id, tenant_id=attempt.tenant_id, fence=attempt.fence + 10**6)
    heart = make_heart(stranger, switch)
    heart.start()
    with pytest.raises(FenceLost):
        stranger.wait(120)
    heart.stop()


def test_no_beat_follows_the_write_that_gives_the_job_away(attempt: Attempt, switch: Switch) -> None:
    heart = make_heart(attempt, switch)
    heart.conclude(lambda: None)
    switch.away = True
    heart.beat()
    assert switch.refused == 0


@pytest.mark.parametrize(
    ("reasons", "error"),
    [
        ([Stop.DRAIN], Drained),
        ([Stop.DRAIN, Stop.CANCEL], CancelRequested),
        ([Stop.LOST, Stop.CANCEL, Stop.DRAIN], FenceLost),
    ],
)
def test_the_strongest_reason_to_stop_wins(reasons: list[Stop], error: type[Exception]) -> None:
    attempt = Attempt(job_id=uuid.uuid4(), tenant_id=uuid.uuid4(), fence=1)
    attempt.check()
    heard: list[Stop] = []
    attempt.on_stop(heard.append)
    for reason in reasons:
        attempt.stop(reason)
    with pytest.raises(error):
        attempt.check()
    late: list[Stop] = []
    attempt.on_stop(late.append)
    assert late == heard[-1:]
