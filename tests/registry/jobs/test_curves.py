"""Curves of any length, read from an index, with what later attempts repeated counted once."""

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from registry.jobs.curves import CURVE, Point, Spread, read_curve
from registry.jobs.events import NewEvent, add_events
from registry.models import Job
from tests.factories import make_adapter, make_job, make_tenant


@pytest.fixture
def job(session: Session) -> Job:
    return make_job(session, make_adapter(session, make_tenant(session)), state="running")


def tell(session: Session, job: Job, steps: range, *, fence: int = 1, **data: Any) -> None:
    points = ({"step": step, "train_loss": float(step), "learning_rate": 0.5, **data} for step in steps)
    add_events(session, job.id, fence, [NewEvent("metrics", "info", "m", point) for point in points])


def test_a_short_curve_is_all_of_its_points(session: Session, job: Job) -> None:
    tell(session, job, range(1, 4), tokens_per_second=100.0)
    add_events(session, job.id, 1, [NewEvent("message", "info", "no point", {"step": 9})])
    curve = read_curve(session, job_id=job.id, points=500)
    assert curve[0] == Point(1, 1, Spread(1.0, 1.0, 1.0), None, 0.5, 100.0)
    assert [point.step for point in curve] == [1, 2, 3]


def test_a_long_curve_keeps_its_extremes_and_its_end(session: Session, job: Job) -> None:
    tell(session, job, range(1, 1001))
    tell(session, job, range(1001, 1002), valid_loss=0.25)
    tell(session, job, range(1002, 1003), train_loss=-7.0)
    curve = read_curve(session, job_id=job.id, points=10)
    assert len(curve) == 10 and curve[-1].step == 1002
    assert sum(point.count for point in curve) == 1002
    assert curve[0].train_loss is not None and curve[0].train_loss.min == 1.0
    assert curve[-1].train_loss == Spread(-7.0, 1001.0, -7.0)
    assert curve[-1].valid_loss == Spread(0.25, 0.25, 0.25)
    assert {point.valid_loss for point in curve[:-1]} == {None}


def test_a_later_attempt_takes_the_place_of_what_it_repeats(session: Session, job: Job) -> None:
    tell(session, job, range(1, 101), fence=5, train_loss=1.0)
    tell(session, job, range(51, 71), fence=8, train_loss=2.0)
    tell(session, job, range(61, 66), fence=9, train_loss=3.0)
    curve = read_curve(session, job_id=job.id, points=500)
    losses = {point.step: point.train_loss.last for point in curve if point.train_loss}
    assert losses == {step: 1.0 if step <= 50 else 2.0 if step <= 60 else 3.0 for step in range(1, 66)}


def test_a_job_without_points_has_an_empty_curve(session: Session, job: Job) -> None:
    assert read_curve(session, job_id=job.id, points=10) == []


def test_numbers_that_are_none_are_left_out(session: Session, job: Job) -> None:
    tell(session, job, range(1, 2), train_loss="high", valid_loss=1e300)
    (point,) = read_curve(session, job_id=job.id, points=10)
    assert point.train_loss is None and point.valid_loss == Spread(1e300, 1e300, 1e300)


def test_a_curve_is_read_from_its_index(session: Session, job: Job) -> None:
    for _ in range(8):
        other = make_job(session, make_adapter(session, make_tenant(session)), state="running")
        session.execute(
            text(
                """INSERT INTO job_events (job_id, type, message, fence, data)
                   SELECT :job, 'metrics', 'm', 1, jsonb_build_object('step', n, 'train_loss', n)
                   FROM generate_series(1, 2000) AS n"""
            ),
            {"job": other.id},
        )
    session.execute(text("ANALYZE job_events"))
    plan = "\n".join(session.scalars(text(f"EXPLAIN {CURVE.text}"), {"job": other.id, "points": 100}))
    assert "ix_job_events_metrics" in plan
    assert "Seq Scan on job_events" not in plan
