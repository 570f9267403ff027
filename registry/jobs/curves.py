"""A job's curves, small enough to draw: one point per bucket of steps, however many steps there were."""

import uuid
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

MOST_POINTS = 2000

# An attempt that resumed at step s takes the place of what earlier ones had told from s on. `attempts` finds each
# fence and its first step with one look into the index; `points` then reads the index alone, in its order.
CURVE = text("""
WITH RECURSIVE attempts (fence, first) AS (
  (SELECT fence, step FROM job_events
    WHERE job_id = :job AND step IS NOT NULL AND fence IS NOT NULL ORDER BY fence, step LIMIT 1)
  UNION ALL
  SELECT next.fence, next.step FROM attempts CROSS JOIN LATERAL (
    SELECT fence, step FROM job_events
     WHERE job_id = :job AND step IS NOT NULL AND fence > attempts.fence ORDER BY fence, step LIMIT 1) AS next
), spans AS (
  SELECT fence, min(first) OVER (ORDER BY fence ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS ends
    FROM attempts
), range AS (
  SELECT (SELECT min(first) FROM attempts) AS low,
         (SELECT step FROM job_events WHERE job_id = :job AND step IS NOT NULL AND fence IS NOT NULL
           ORDER BY fence DESC, step DESC LIMIT 1) AS high
), buckets AS (
  SELECT width_bucket(e.step::numeric, r.low, r.high + 1, least(:points, r.high - r.low + 1)::int) AS bucket,
         count(*) AS measured, max(e.step) AS step, max(e.fence) AS fence,
         min(e.train_loss) AS train_min, max(e.train_loss) AS train_max,
         min(e.valid_loss) AS valid_min, max(e.valid_loss) AS valid_max,
         (max(ARRAY[e.step, e.valid_loss]) FILTER (WHERE e.valid_loss IS NOT NULL))[2] AS valid_last,
         avg(e.tokens_per_second) AS tokens_per_second
    FROM spans AS s CROSS JOIN range AS r JOIN job_events AS e
      ON e.job_id = :job AND e.fence = s.fence AND e.step IS NOT NULL AND (s.ends IS NULL OR e.step < s.ends)
   GROUP BY bucket
)
SELECT b.step, b.measured, b.train_min, b.train_max, last.train_loss AS train_last,
       b.valid_min, b.valid_max, b.valid_last, last.learning_rate, b.tokens_per_second
  FROM buckets AS b CROSS JOIN LATERAL (
    SELECT train_loss, learning_rate FROM job_events
     WHERE job_id = :job AND fence = b.fence AND step = b.step ORDER BY id DESC LIMIT 1) AS last
 ORDER BY b.step
""")


@dataclass(frozen=True, slots=True)
class Spread:
    """What a number was within one bucket."""

    min: float
    max: float
    last: float


@dataclass(frozen=True, slots=True)
class Point:
    """One bucket: its last step, how many measurements it holds, and what they were."""

    step: int
    count: int
    train_loss: Spread | None
    valid_loss: Spread | None
    learning_rate: float | None
    tokens_per_second: float | None


def read_curve(session: Session, *, job_id: uuid.UUID, points: int) -> list[Point]:
    """At most `points` points of a job's curves, by step. Steps that a later attempt repeated count once."""
    rows = session.execute(CURVE, {"job": job_id, "points": points})
    return [
        Point(
            step=row.step,
            count=row.measured,
            train_loss=_spread(row.train_min, row.train_max, row.train_last),
            valid_loss=_spread(row.valid_min, row.valid_max, row.valid_last),
            learning_rate=row.learning_rate,
            tokens_per_second=row.tokens_per_second,
        )
        for row in rows
    ]


def _spread(low: float | None, high: float | None, last: float | None) -> Spread | None:
    if low is None or high is None:
        return None
    return Spread(low, high, high if last is None else last)
