"""`fake_app` that is told to stop while it starts: once a job is claimed, and before Celery listens to signals."""

import os
import signal
import time

from celery import signals

from tests.worker.fake_app import app
from worker.app import services

__all__ = ["app"]


def tell_to_stop(**_: object) -> None:
    while not services[0].runner._attempts:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


signals.worker_init.connect(tell_to_stop)  # after that of the worker, which starts its slots
