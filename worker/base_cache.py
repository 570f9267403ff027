"""Base models on local disk, kept between jobs: fetched and verified once, looked at again before every use."""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from registry.jobs.inputs import StoredFile
from registry.storage import ObjectStore
from registry.storage.digests import digest_file

log = logging.getLogger(__name__)

LOCK_SECONDS = 0.1
INCOMING = ".incoming"

Run = Callable[[Callable[[], None]], None]
Stamp = list[int]  # size, modification time in ns


class BaseCache:
    """`<root>/<digest>/…`. Workers of one machine share it; a file lock per base keeps them out of each other's way."""

    def __init__(self, root: Path, store: ObjectStore, *, max_bytes: int = 0) -> None:
        self._root = root
        self._store = store
        self._max_bytes = max_bytes

    @contextmanager
    def using(self, digest: str) -> Iterator[None]:
        """Meanwhile nobody evicts this base. At the end others make room, if there is too much."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._root / f"{digest}.use").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield
        with suppress(OSError):  # others fetch and remove beside us; the next one makes room
            self._evict()

    def ensure(
        self, digest: str, files: Sequence[StoredFile], check: Callable[[], None], run: Run = lambda get: get()
    ) -> Path:
        """A folder that holds exactly these bytes. `check` is called between files and while another worker
        is at it, and may raise to give up; `run` calls what gets one file, and may give up waiting for it."""
        folder = self._root / digest
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(digest, check):
            self._remove_strangers(folder, files)
            known = self._read_stamps(digest)
            for file in files:
                check()
                path = folder / file.path
                if path.is_file() and known.get(file.path) == _stamp(path):
                    continue
                run(partial(self._verify_or_fetch, file, path))
                known[file.path] = _stamp(path)
                self._stamps_path(digest).write_text(json.dumps(known))
            os.utime(folder)  # used now
        return folder

    def doubt(self, digest: str) -> None:
        """Have every file of this base read and compared again before its next use."""
        with self._locked(digest, lambda: None):
            self._stamps_path(digest).unlink(missing_ok=True)

    def _evict(self) -> None:
        """Remove what nobody uses, the one used longest ago first, until the rest is not too much."""
        if not self._max_bytes:
            return
        folders = [path for path in self._root.iterdir() if path.is_dir() and path.suffix != INCOMING]
        bases = sorted(folders, key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in bases}
        for path in bases:
            if sum(sizes.values()) <= self._max_bytes:
                return
            if self._remove_unused(path):
                log.info("base %s is removed from the cache: %d bytes", path.name, sizes.pop(path))

    def _remove_unused(self, folder: Path) -> bool:
        with (self._root / f"{folder.name}.use").open("ab") as file:
            if not _try_lock(file):
                return False
            self._stamps_path(folder.name).unlink(missing_ok=True)
            shutil.rmtree(folder.with_suffix(INCOMING), ignore_errors=True)
            shutil.rmtree(folder)
        return True

    def _remove_strangers(self, folder: Path, files: Sequence[StoredFile]) -> None:
        """What somebody left who was killed while fetching, or gave up: a base with a surplus file is refused."""
        shutil.rmtree(folder.with_suffix(INCOMING), ignore_errors=True)
        for path in {path.name for path in folder.iterdir()} - {file.path for file in files}:
            (folder / path).unlink(missing_ok=True)

    def _verify_or_fetch(self, file: StoredFile, path: Path) -> None:
        if path.is_file():
            if digest_file(path) == (file.sha256, file.size):
                return
            log.warning("%s in the base cache is damaged; it is fetched again", path)
        # Beside the base: who gave up waiting for this left it to go on, and others use the folder meanwhile.
        fetched = path.parent.with_suffix(INCOMING) / uuid.uuid4().hex / path.name
        fetched.parent.mkdir(mode=0o700, parents=True)
        self._store.fetch(file.key, fetched, sha256=file.sha256, size=file.size)
        fetched.replace(path)
        fetched.parent.rmdir()

    def _stamps_path(self, digest: str) -> Path:
        return self._root / f"{digest}.json"

    def _read_stamps(self, digest: str) -> dict[str, Stamp]:
        try:
            stamps: dict[str, Stamp] = json.loads(self._stamps_path(digest).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return stamps

    @contextmanager
    def _locked(self, digest: str, check: Callable[[], None]) -> Iterator[None]:
        """Who holds the lock may be fetching for an hour, and `check` may give up meanwhile."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._root / f"{digest}.lock").open("ab") as file:
            while not _try_lock(file):
                check()
                time.sleep(LOCK_SECONDS)
            yield


def _try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
