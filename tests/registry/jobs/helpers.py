"""Jobs in a committed database, and several threads that meet at one moment."""

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import text, update
from sqlalchemy.orm import Session

from registry.db import SessionFactory, transaction
from registry.jobs.lease import claim
from registry.jobs.publish import Published, publish_version
from registry.jobs.spec import TrainSpec
from registry.jobs.submit import Submitted, submit_training
from registry.models import Adapter, Job
from tests.factories import make_adapter, make_base_model, make_blob, make_file, make_job, make_tenant

T = TypeVar("T")
LEASE = 60.0


def race(*calls: Callable[[], T]) -> list[T | Exception]:
    """Every call in its own thread, started together; the results, or what was raised, in order."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T | Exception:
        barrier.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def queue_jobs(sessions: SessionFactory, count: int = 1, *, adapter: Adapter | None = None, **tenant: Any) -> Adapter:
    """Commits `count` queued jobs of one adapter, of a new tenant unless told."""
    with transaction(sessions) as session:
        adapter = adapter or make_adapter(session, make_tenant(session, **tenant))
        for _ in range(count):
            make_job(session, adapter)
    return adapter


def claim_one(sessions: SessionFactory, worker: str = "worker-1", queues: Sequence[str] = ("default",)) -> Job | None:
    with transaction(sessions) as session:
        return claim(session, queues=queues, worker=worker, lease_seconds=LEASE)


def claimed(sessions: SessionFactory) -> Job:
    """A freshly queued and claimed job."""
    queue_jobs(sessions)
    job = claim_one(sessions)
    assert job is not None
    return job


def reload(sessions: SessionFactory, job_id: uuid.UUID) -> Job:
    with sessions() as session:
        return session.get_one(Job, job_id)


def expire_lease(sessions: SessionFactory, job_id: uuid.UUID) -> None:
    """As if the worker had been silent for longer than its lease."""
    with transaction(sessions) as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_expires_at=text("clock_timestamp() - interval '1 s'"))
        )


def make_due(sessions: SessionFactory) -> None:
    """As if every backoff had passed."""
    with transaction(sessions) as session:
        session.execute(update(Job).where(Job.state == "queued").values(run_after=text("clock_timestamp()")))


def publish(sessions: SessionFactory, job: Job, fence: int | None = None) -> Published:
    """Stores two blobs and publishes them, as the worker that holds `fence` would."""
    with transaction(sessions) as session:
        files = {name: make_blob(session, tenant_id=job.tenant_id).id for name in ("a.json", "b.safetensors")}
    with transaction(sessions) as session:
        return publish_version(
            session,
            job_id=job.id,
            fence=fence or job.fence or 0,
            files=files,
            manifest={"files": sorted(files)},
            metrics={"loss": 0.5},
            trained_tokens=128,
        )


@dataclass
class Shop:
    """What a submit needs."""

    sessions: SessionFactory
    tenant_id: uuid.UUID
    base_model: Any
    training_file: Any

    def submit(self, session: Session, **over: Any) -> Submitted:
        values: dict[str, Any] = {
            "tenant_id": self.tenant_id,
            "base_model": self.base_model,
            "adapter_name": "poet",
            "training_file": self.training_file,
            "validation_file": None,
            "spec": TrainSpec(),
            "request": {"model": self.base_model.name},
            "idempotency": None,
            **over,
        }
        return submit_training(session, **values)

    def send(self, **over: Any) -> Submitted:
        """One request: submit and commit."""
        with transaction(self.sessions) as session:
            return self.submit(session, **over)


def open_shop(sessions: SessionFactory, **tenant: Any) -> Shop:
    with transaction(sessions) as session:
        owner = make_tenant(session, **tenant)
        return Shop(sessions, owner.id, make_base_model(session), make_file(session, owner))
