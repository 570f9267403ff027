"""Sends wake-ups to Celery's queues by task name: no task code is imported, no result is kept."""

import uuid

from celery import Celery

WAKE_TASK = "depot.wake"
SOCKET_SECONDS = 2.0

# Without timeouts a broker that accepts connections and never answers would hold its caller for ever.
_TRANSPORT = {
    "socket_timeout": SOCKET_SECONDS,
    "socket_connect_timeout": SOCKET_SECONDS,
    "retry_on_timeout": False,
    "max_retries": 0,
}


class CeleryDispatcher:
    """Tells a queue that a job may be waiting. A message is a hint and carries the job's id only."""

    def __init__(self, redis_url: str) -> None:
        self._app = Celery("depot-dispatch", broker=redis_url, set_as_current=False)
        self._app.conf.update(
            accept_content=["json"],
            broker_connection_retry=False,
            broker_transport_options=_TRANSPORT,
            task_ignore_result=True,
            task_publish_retry=False,
            task_serializer="json",
        )

    def send(self, queue: str, job_id: uuid.UUID) -> None:
        """Raises whatever the broker's client raises, within a few seconds, when the message is not accepted."""
        self._app.send_task(WAKE_TASK, args=[str(job_id)], queue=queue, retry=False, ignore_result=True)
