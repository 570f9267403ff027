"""A folder that appears all at once, and of which a killed process leaves the finished files to the next."""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_STATE = "state.jsonl"
_FILES = "files"


class Stage:
    """The hidden folder: `files/` becomes the target, and one line of the state file tells of each finished file."""

    def __init__(self, directory: Path, state: IO[bytes], key: str) -> None:
        self.files = directory / _FILES
        self._state = state
        self._done = self._read(key)
        if not self._done:
            shutil.rmtree(self.files, ignore_errors=True)
            self.files.mkdir()
            state.truncate(0)
            self._append({"key": key, "boot": _boot()})

    def finished(self, path: str, size: int) -> dict[str, Any] | None:
        """What `finish` was told about the file, if it is there and was not written to since."""
        record: dict[str, Any] | None = self._done.get(path)
        file = self.files / path
        if record is None or not file.is_file() or file.stat().st_size != size:
            return None
        return record if record["stamp"] == _stamp(file) else None

    def finish(self, path: str, facts: dict[str, Any]) -> None:
        """The file is complete; `facts` are for the process that goes on after a kill."""
        self._append({"path": path, "stamp": _stamp(self.files / path), **facts})

    def _append(self, record: dict[str, Any]) -> None:
        self._state.write(json.dumps(record).encode() + b"\n")

    def _read(self, key: str) -> dict[str, Any]:
        """Finished files by name, if the state is about the same output; the key stands for itself."""
        records = []
        for line in self._state.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # the kill came while it was written
                self._state.seek(-len(line), os.SEEK_END)
                self._state.truncate()
                break
            records.append(json.loads(line))
        if not records or records[0] != {"key": key, "boot": _boot()} or not self.files.is_dir():
            self._state.seek(0)
            return {}
        return {record.get("path", ""): record for record in records}


@contextmanager
def resumable_directory(target: Path, key: str) -> Iterator[Stage]:
    """A stage beside `target` that becomes it when the block ends well and vanishes when it raises.

    After a kill it stays behind, and the next call with the same key goes on with it; another key starts anew, and so
    does the first call after the machine started: what the kernel held was not forced to disk.
    FileExistsError if `target` exists or another process is at work on it.
    """
    stage = target.parent / f".{target.name}.partial"
    if target.exists():
        raise FileExistsError(f"{target.name} exists already")
    stage.mkdir(exist_ok=True)
    with (stage / _STATE).open("a+b", buffering=0) as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing {target.name}") from None
        if not _is_still_there(state, stage / _STATE):  # its owner ended in between
            raise FileExistsError(f"another process was writing {target.name}")
        state.seek(0)
        try:
            if target.exists():
                raise FileExistsError(f"{target.name} exists already")
            prepared = Stage(stage, state, key)
            yield prepared
            prepared.files.rename(target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stamp(file: Path) -> list[int]:
    """Other after the file was written to or replaced."""
    status = file.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _boot() -> str:
    """Which start of the machine this is; where it does not tell, one that never was."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
