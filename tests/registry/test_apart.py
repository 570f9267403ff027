"""Work in a thread that nobody has to wait for."""

import subprocess
import sys

import pytest

from registry.apart import run_apart
from tests.conftest import ROOT


def test_what_it_returns_and_raises_is_the_callers() -> None:
    assert run_apart(lambda: 7, "seven").result() == 7
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda: 1 // 0, "nothing").result()


def test_a_process_ends_although_such_work_goes_on() -> None:
    code = "import threading; from registry.apart import run_apart; run_apart(threading.Event().wait, 'for ever')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False).returncode == 0
