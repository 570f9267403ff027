"""`worker.app` with the child that a test can hold."""

import sys

from worker import service

service.CHILD_ARGV = (sys.executable, "-P", "-m", "tests.worker.held_child")

from worker.app import app  # noqa: E402  - reads the line above

__all__ = ["app"]
