import uuid

import pytest
from sqlalchemy import select, text, update

from registry.db import SessionFactory, transaction
from registry.jobs.outbox import relay
from registry.models import Outbox
from tests.registry.jobs.helpers import race

Sent = list[tuple[str, uuid.UUID]]


def fill(sessions: SessionFactory, count: int) -> list[uuid.UUID]:
    ids = [uuid.uuid4() for _ in range(count)]
    with transaction(sessions) as session:
        session.add_all(Outbox(queue="default", job_id=job_id) for job_id in ids)
    return ids


def unsent(sessions: SessionFactory) -> list[Outbox]:
    with sessions() as session:
        return list(session.scalars(select(Outbox).where(Outbox.sent_at.is_(None)).order_by(Outbox.id)))


def retry_now(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        session.execute(update(Outbox).values(next_at=text("clock_timestamp()")))


def refuse(queue: str, job_id: uuid.UUID) -> None:
    raise ConnectionError("no broker")


def test_every_wake_is_sent_once_and_stays_sent(sessions: SessionFactory) -> None:
    ids, sent = fill(sessions, 5), Sent()
    assert relay(sessions, lambda *message: sent.append(message)) == 5
    assert sorted(sent) == sorted(("default", job_id) for job_id in ids)
    assert relay(sessions, lambda *message: sent.append(message)) == 0
    assert unsent(sessions) == []


def test_a_relay_sends_at_most_its_limit(sessions: SessionFactory) -> None:
    fill(sessions, 5)
    assert relay(sessions, lambda *_: None, limit=3) == 3
    assert len(unsent(sessions)) == 2


def test_a_wake_that_is_not_due_stays(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        later = text("clock_timestamp() + interval '1 hour'")
        session.add(Outbox(queue="default", job_id=uuid.uuid4(), next_at=later))
    assert relay(sessions, lambda *_: None) == 0


def test_a_wake_whose_sending_failed_is_sent_later(sessions: SessionFactory) -> None:
    ids, sent = fill(sessions, 1), Sent()
    delays = []
    for attempt in range(1, 4):
        assert relay(sessions, refuse) == 0
        row = unsent(sessions)[0]
        assert row.attempts == attempt
        delays.append(row.next_at - row.created_at)
        assert relay(sessions, lambda *message: sent.append(message)) == 0  # backing off
        retry_now(sessions)
    assert delays == sorted(delays)
    assert relay(sessions, lambda *message: sent.append(message)) == 1
    assert sent == [("default", ids[0])]


def test_a_dead_broker_is_asked_once_per_relay(sessions: SessionFactory) -> None:
    fill(sessions, 5)
    asked = []

    def count_and_refuse(queue: str, job_id: uuid.UUID) -> None:
        asked.append(job_id)
        refuse(queue, job_id)

    assert relay(sessions, count_and_refuse) == 0
    assert len(asked) == 1


def test_a_wake_is_sent_again_when_its_sending_was_not_recorded(sessions: SessionFactory) -> None:
    ids, sent = fill(sessions, 1), Sent()

    def send_and_die(queue: str, job_id: uuid.UUID) -> None:
        sent.append((queue, job_id))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relay(sessions, send_and_die)
    assert relay(sessions, lambda *message: sent.append(message)) == 1
    assert sent == [("default", ids[0])] * 2


def test_a_relay_in_the_middle_of_a_send_does_not_hold_up_another(sessions: SessionFactory) -> None:
    ids = fill(sessions, 3)
    inner, outer = Sent(), Sent()

    def send_while_another_relays(queue: str, job_id: uuid.UUID) -> None:
        outer.append((queue, job_id))
        if len(outer) == 1:
            relay(sessions, lambda *message: inner.append(message))

    assert relay(sessions, send_while_another_relays) == 1
    assert sorted(inner + outer) == sorted(("default", job_id) for job_id in ids)


def test_parallel_relays_send_everything_once(sessions: SessionFactory) -> None:
    ids, sent = fill(sessions, 40), Sent()
    counts = race(*[lambda: relay(sessions, lambda *message: sent.append(message))] * 4)
    assert sum(n for n in counts if isinstance(n, int)) == 40
    assert sorted(sent) == sorted(("default", job_id) for job_id in ids)
