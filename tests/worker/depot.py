"""A depot with one tiny base model, and the handles tests need on it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
from sqlalchemy import func, select

from registry.base_models import create_base_model
from registry.blobs import store_file
from registry.db import SessionFactory, transaction
from registry.files import create_file
from registry.jobs.cancel import request_cancel
from registry.jobs.pause import request_pause, resume
from registry.jobs.spec import TrainSpec
from registry.jobs.submit import submit_training
from registry.models import BaseModel, File, Job, JobEvent, Merge, Tenant, Version
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from registry.tenants import default_tenant
from tests.tiny import make_rows, write_jsonl

ROOT = Path(__file__).parent.parent.parent
BASE_NAME = "tiny/llama"
LORA = {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}


@dataclass
class Depot:
    sessions: SessionFactory
    store: ObjectStore
    scratch: Path
    tenant: Tenant
    base: BaseModel

    def submit(
        self,
        *,
        rows: list[dict[str, Any]] | None = None,
        validation: list[dict[str, Any]] | None = None,
        adapter: str = "support-bot",
        **spec: Any,
    ) -> uuid.UUID:
        """A queued training job on `rows`."""
        training_file = self._upload_rows(make_rows(16) if rows is None else rows)
        validation_file = None if validation is None else self._upload_rows(validation)
        defaults = {"lora": LORA, "n_epochs": 2, "batch_size": 8, "max_length": 128, "learning_rate": 1e-2}
        with transaction(self.sessions) as session:
            submitted = submit_training(
                session,
                tenant_id=self.tenant.id,
                base_model=self.base,
                adapter_name=adapter,
                training_file=training_file,
                validation_file=validation_file,
                spec=TrainSpec.model_validate({**defaults, **spec}),
                request={},
                idempotency=None,
            )
        return submitted.job.id

    def _upload_rows(self, rows: list[dict[str, Any]]) -> File:
        return upload(self, write_jsonl(self.scratch / f"{uuid.uuid4().hex}.jsonl", rows), "fine-tune")

    def job(self, job_id: uuid.UUID) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def states(self, job_ids: Sequence[uuid.UUID]) -> set[str]:
        return {self.job(job_id).state for job_id in job_ids}

    def cancel(self, job_id: uuid.UUID) -> None:
        with transaction(self.sessions) as session:
            request_cancel(session, tenant_id=self.tenant.id, job_id=job_id)

    def pause(self, job_id: uuid.UUID) -> None:
        with transaction(self.sessions) as session:
            request_pause(session, tenant_id=self.tenant.id, job_id=job_id)

    def resume(self, job_id: uuid.UUID) -> None:
        with transaction(self.sessions) as session:
            resume(session, tenant_id=self.tenant.id, job_id=job_id)

    def versions(self) -> list[Version]:
        with self.sessions() as session:
            return list(session.scalars(select(Version).order_by(Version.version)))

    def merges(self) -> list[Merge]:
        with self.sessions() as session:
            return list(session.scalars(select(Merge)))

    def events(self, job_id: uuid.UUID) -> list[JobEvent]:
        with self.sessions() as session:
            return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id)))

    def skip_backoff(self, job_id: uuid.UUID) -> None:
        """Make a requeued job claimable now: what delays it is tested where it is decided."""
        with transaction(self.sessions) as session:
            session.get_one(Job, job_id).run_after = session.scalars(select(func.clock_timestamp())).one()


def upload(depot: Depot, path: Path, purpose: Any) -> File:
    sha256, size = digest_file(path)
    blob_id = store_file(depot.sessions, depot.store, path, sha256=sha256, size=size, tenant_id=depot.tenant.id)
    with transaction(depot.sessions) as session:
        return create_file(
            session, tenant_id=depot.tenant.id, blob_id=blob_id, filename=path.name, purpose=purpose, report=None
        )


def make_depot(
    sessions: SessionFactory, store: ObjectStore, scratch: Path, base_dir: Path, *, name: str = BASE_NAME
) -> Depot:
    with transaction(sessions) as session:
        tenant = default_tenant(session)
    depot = Depot(sessions, store, scratch, tenant, base=None)  # type: ignore[arg-type]  # set below
    files = {path.name: upload(depot, path, "base-model").id for path in sorted(base_dir.iterdir())}
    with transaction(sessions) as session:
        depot.base = create_base_model(
            session, store=store, tenant_id=tenant.id, name=name, source="upload", revision=None, files=files
        )
    return depot


def wait_until(fact: Callable[[], Any], *, seconds: float = 120.0, what: str = "") -> Any:
    """The first true answer of `fact`; fails with `what` when there is none in time."""
    end = time.monotonic() + seconds
    while not (answer := fact()):
        assert time.monotonic() < end, f"waited {seconds} s for {what or fact}"
        time.sleep(0.05)
    return answer


class WorkerProcess:
    """The real thing: `celery -A worker.app worker` as a child of the test."""

    def __init__(self, env: dict[str, str], log: Path, *, app: str) -> None:
        argv = [sys.executable, "-m", "celery", "-A", app, "worker", "-P", "threads", "-c", "2"]
        argv += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        with log.open("ab") as file:
            self.process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self, seconds: float = 120.0) -> int:
        """Ask it to stop; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def children(self) -> list[int]:
        """Process ids of trainers that this worker started."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]


def worker_env(
    *,
    database_url: str,
    redis_url: str,
    objects: Path,
    home: Path,
    poll_seconds: float = 0.5,
    checkpoint_seconds: float = 600.0,
) -> dict[str, str]:
    """Settings of a quick worker: leases that a busy machine keeps, short polls."""
    settings = {
        "DEPOT_DATABASE_URL": database_url,
        "DEPOT_REDIS_URL": redis_url,
        "DEPOT_STORE_URL": f"file://{objects}",
        "DEPOT_SECRET_KEY": "x" * 40,
        "DEPOT_WORK_DIR": str(home / "work"),
        "DEPOT_CACHE_DIR": str(home / "cache"),
        "DEPOT_SLOTS": "2",
        "DEPOT_HEARTBEAT_SECONDS": "0.4",
        "DEPOT_LEASE_SECONDS": "6",
        "DEPOT_REAPER_SECONDS": "0.4",
        "DEPOT_POLL_SECONDS": str(poll_seconds),
        "DEPOT_RELAY_SECONDS": "0.2",
        "DEPOT_CHECKPOINT_SECONDS": str(checkpoint_seconds),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEPOT_")}
    return kept | settings


def connect_redis(url: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"))


def metrics_of(events: Sequence[JobEvent]) -> list[dict[str, Any]]:
    return [event.data for event in events if event.type == "metrics" and event.data]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
