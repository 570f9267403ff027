"""Scratch space: one private folder per worker, one below it per attempt, nothing left behind by the dead."""

import fcntl
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from registry.failpoints import hit
from worker.health import SUFFIX as PULSE_SUFFIX

log = logging.getLogger(__name__)


class WorkDir:
    """The folder of one worker below a root that workers share.

    A worker holds a file lock next to its folder as long as it lives, however it dies: a folder whose lock is free
    belongs to nobody and is removed by the next worker that starts."""

    def __init__(self, root: Path, name: str) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = root.resolve()
        self._lock_path = self._root / f"{name}.lock"
        self._lock = _hold(self._lock_path)
        self.path = self._root / name
        self.pulse_path = self._root / f"{name}{PULSE_SUFFIX}"
        self.path.mkdir(mode=0o700)

    def remove_leftovers(self) -> int:
        """Remove the folders of workers that are gone; returns how many."""
        removed = 0
        for lock_path in self._root.glob("*.lock"):
            if lock_path != self._lock_path and _remove_if_dead(lock_path):
                log.info("removed what the dead worker %s left in %s", lock_path.stem, self._root)
                removed += 1
        return removed

    @contextmanager
    def attempt(self, job_id: uuid.UUID, fence: int) -> Iterator[Path]:
        """A private folder for one attempt, removed at its end."""
        path = self.path / f"{job_id.hex}-{fence}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            hit("work.before_cleanup")
            with suppress(OSError):  # under another name nobody who was left behind writes into it any more
                path = path.rename(path.with_name(f"{path.name}.gone"))
            shutil.rmtree(path, ignore_errors=True)

    def make_home(self) -> Path:
        """A private folder for a child process, which outlives attempts. Whoever asked for it removes it."""
        return Path(tempfile.mkdtemp(prefix="child-", dir=self.path))

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.pulse_path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()


def _hold(path: Path) -> BinaryIO:
    """An open file at `path` with an exclusive lock on it."""
    while True:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, path):
            return file
        file.close()  # a sweeper removed it between our open and our lock


def _remove_if_dead(lock_path: Path) -> bool:
    try:
        file = lock_path.open("rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if not _is_at(file, lock_path):
            return False
        shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
        lock_path.with_suffix(PULSE_SUFFIX).unlink(missing_ok=True)
        lock_path.unlink()
        return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
