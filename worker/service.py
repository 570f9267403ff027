"""A whole worker without Celery: slots, heartbeat connections, relay and reaper, put together from settings."""

import logging
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from registry.db import make_engine, make_sessions
from registry.dispatch import CeleryDispatcher
from registry.settings import Settings
from registry.storage import ObjectStore
from registry.storage.open import make_store
from worker.base_cache import BaseCache
from worker.health import PULSE_SECONDS, pulse
from worker.host import Host
from worker.housekeeping import (
    Chore,
    make_collector,
    make_evictor,
    make_messenger,
    make_presence,
    make_reaper,
    make_relay,
)
from worker.runner import Runner
from worker.supervisor import Patience
from worker.warm import WarmPool
from worker.workspace import WorkDir

# -P keeps the working directory, which holds files of tenants, off the import path.
CHILD_ARGV = (sys.executable, "-P", "-m", "worker.child")
EVICT_SECONDS = 5.0
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """Started once, drained and stopped once."""

    host: Host
    runner: Runner
    chores: Sequence[Chore]

    def start(self) -> None:
        self.host.work.remove_leftovers()
        for chore in self.chores:
            chore.start()
        self.runner.start()
        log.info("worker %s is ready", self.host.name)

    def drain(self) -> None:
        self.runner.drain()

    def stop(self, seconds: float) -> None:
        """Wait for the slots to give their jobs back; whoever takes longer is left to the reaper."""
        for chore in self.chores:
            chore.stop()
        if not self.runner.join(seconds):
            log.warning("worker %s stops before its jobs could be given back", self.host.name)
        self.host.warm.close()
        self.host.work.close()


def make_service(settings: Settings, queues: Sequence[str]) -> Service:
    """A worker as these settings describe it."""
    name = worker_name()
    sessions = make_sessions(make_engine(settings.database_url, pool_size=2 * settings.slots + 4))
    store = open_store(settings)
    host = Host(
        name=name,
        sessions=sessions,
        beats=make_sessions(make_engine(settings.database_url, pool_size=settings.slots)),
        store=store,
        work=WorkDir(settings.work_dir, name.replace(":", "-")),
        cache=BaseCache(settings.cache_dir.resolve() / "base", store, max_bytes=settings.cache_bytes),
        warm=WarmPool(slots=settings.slots, max_bytes=settings.warm_bytes, idle_seconds=settings.warm_seconds),
        lease_seconds=settings.lease_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
        max_infra_failures=settings.max_infra_failures,
        checkpoint_seconds=settings.checkpoint_seconds,
        threads=max(1, cpu_count() // settings.slots),
        patience=Patience(
            grace_seconds=GRACE_SECONDS,
            stall_seconds=settings.stall_seconds,
            detached_seconds=settings.detached_seconds,
        ),
        child_argv=CHILD_ARGV,
    )
    dispatcher = CeleryDispatcher(settings.redis_url)
    chores = (
        make_relay(sessions, dispatcher.send, seconds=settings.relay_seconds),
        make_reaper(
            sessions,
            seconds=settings.reaper_seconds,
            lease_seconds=settings.lease_seconds,
            max_infra_failures=settings.max_infra_failures,
        ),
        make_collector(
            sessions,
            store,
            seconds=settings.gc_seconds,
            grace_seconds=settings.gc_grace_seconds,
            checkpoints_seconds=settings.keep_checkpoints_seconds,
        ),
        make_messenger(
            sessions,
            pepper=settings.secret_key.get_secret_value().encode(),
            allow_lan=settings.webhook_allow_lan,
            seconds=settings.relay_seconds,
        ),
        make_evictor(host.warm, seconds=EVICT_SECONDS),
        make_presence(sessions, name=name, queues=queues, slots=settings.slots, seconds=settings.reaper_seconds),
    )
    runner = Runner(host, queues=queues, slots=settings.slots, poll_seconds=settings.poll_seconds)
    beat = Chore(
        "pulse", pulse(host.work.pulse_path, runner.is_whole), seconds=PULSE_SECONDS, longest_seconds=PULSE_SECONDS
    )
    return Service(host, runner, (*chores, beat))


def open_store(settings: Settings) -> ObjectStore:
    access, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    return make_store(
        settings.store_url,
        secret_key=settings.secret_key.get_secret_value(),
        public_url=settings.public_url,
        s3_endpoint_url=settings.s3_endpoint_url,
        s3_public_endpoint_url=settings.s3_public_endpoint_url,
        s3_region=settings.s3_region,
        s3_access_key_id=access.get_secret_value() if access else None,
        s3_secret_access_key=secret.get_secret_value() if secret else None,
    )


def worker_name() -> str:
    """Unlike any worker before or after it: hostname:pid:random."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def cpu_count() -> int:
    """Cores this process may use, which a container can limit."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1
