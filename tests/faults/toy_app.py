"""`worker.app` whose trainer is `toy_child`."""

import sys

from worker import service

service.CHILD_ARGV = (sys.executable, "-P", "-m", "tests.faults.toy_child")

from worker.app import app  # noqa: E402  - reads the line above

__all__ = ["app"]
