"""Where a job waits, how urgent it is and how long it may wait; and which workers look for work."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from registry.errors import UnknownQueue
from registry.jobs.clock import NOW
from registry.models import Worker

DEFAULT_QUEUE = "default"
LONGEST_WAIT_SECONDS = 7 * 24 * 3600
FORGOTTEN_AFTER = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Placement:
    """The lower `priority`, the earlier. Waiting for longer than `deadline_seconds` at a time fails the job."""

    queue: str = DEFAULT_QUEUE
    priority: int = 100
    deadline_seconds: int = LONGEST_WAIT_SECONDS


DEFAULT_PLACEMENT = Placement()


def note_worker(session: Session, *, name: str, queues: Sequence[str], slots: int) -> None:
    """Records that this worker looks for work now; workers unseen for a week are forgotten."""
    seen = {"queues": list(queues), "slots": slots, "seen_at": NOW}
    new = insert(Worker).values(name=name, **seen)
    session.execute(new.on_conflict_do_update(index_elements=[Worker.name], set_=seen))
    session.execute(delete(Worker).where(Worker.seen_at < NOW - FORGOTTEN_AFTER))


def check_queue(session: Session, queue: str) -> None:
    """UnknownQueue unless this is the default queue, or a worker served it within the last week."""
    if queue == DEFAULT_QUEUE:
        return
    known = set(session.scalars(select(func.unnest(Worker.queues)).distinct())) | {DEFAULT_QUEUE}
    if queue not in known:
        raise UnknownQueue(f"No worker serves this queue. There is: {', '.join(sorted(known))}.", param="depot.queue")
