"""`worker.app` with the fake child. The folder of the adapter it returns is in FAKE_ADAPTER."""

import os
import sys
from pathlib import Path

from worker import service

service.CHILD_ARGV = (sys.executable, str(Path(__file__).parent / "fake_child.py"), os.environ["FAKE_ADAPTER"])

from worker.app import app  # noqa: E402  - reads the line above

__all__ = ["app"]
