"""Entry point: `celery -A worker.app worker -P threads -c 2 --without-gossip --without-mingle --without-heartbeat`.

Celery delivers hints. Jobs are claimed from Postgres by the Runner's own threads, which start before the broker is
even looked for and do not care whether it is there."""

import atexit
import logging
import signal
import sys
from typing import Any

from celery import Celery, signals
from kombu.entity import Queue

from registry import failpoints
from registry.settings import Settings
from worker.broker import forgive_strangers
from worker.service import Service, make_service

STOP_SECONDS = 25.0  # longer than a child's grace and the storing of its checkpoint, shorter than what `up` waits

settings = Settings()
failpoints.arm(settings.failpoints)
queues = [name.strip() for name in settings.queues.split(",") if name.strip()]

forgive_strangers()
app = Celery("depot", broker=settings.redis_url)
app.conf.update(
    task_ignore_result=True,
    result_backend=None,
    accept_content=["json"],
    task_serializer="json",
    task_acks_late=False,
    task_queues=[Queue(name) for name in queues],
    task_default_queue=queues[0],
    task_publish_retry=False,
    worker_pool="threads",
    worker_concurrency=2,
    worker_prefetch_multiplier=1,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_channel_error_retry=True,  # Redis may refuse a command, for example while it is full
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry_on_timeout": False,
    },
)

services: list[Service] = []


def wake(job_id: str) -> None:
    """A hint that a job may be claimable; which one, Postgres knows better."""
    logging.getLogger(__name__).debug("woken for job %s", job_id)
    for service in services:
        service.runner.wake()


def log_to_stderr(**_: Any) -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s [%(threadName)s] %(message)s",
    )


def start(**_: Any) -> None:
    # Not `worker_ready`, which waits for the broker.
    # Celery listens to signals a moment later; jobs run from now on, and `stop` at the exit gives them back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    service = make_service(settings, queues)
    services.append(service)
    atexit.register(stop)
    service.start()


def drain(**_: Any) -> None:
    for service in services:
        service.drain()


def stop(**_: Any) -> None:
    while services:
        service = services.pop()
        service.drain()
        service.stop(STOP_SECONDS)


app.task(wake, name="depot.wake")
signals.setup_logging.connect(log_to_stderr)
signals.worker_init.connect(start)
signals.worker_shutting_down.connect(drain)
signals.worker_shutdown.connect(stop)
