"""Checkpoints as the supervisor sees them: stored beside the running child, under the fence."""

import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lora_core.checkpoint import CHECKPOINT_FILES, TENSORS_FILE, CheckpointDocument, read_document
from lora_core.errors import BadCheckpoint
from registry.db import transaction
from registry.errors import FenceLost
from registry.failpoints import hit
from registry.jobs.checkpoints import commit_checkpoint, record_resume
from worker.attempt import Attempt, Stop
from worker.host import Host
from worker.outages import persist
from worker.protocol import CheckpointMessage, CheckpointNews, ResumedMessage
from worker.publish import OutputFile, SavedAdapter, describe, store_output

# How long the end of an attempt may wait for its last checkpoint to be stored.
STORE_SECONDS = {Stop.LOST: 0.0, Stop.CANCEL: 0.0, Stop.DRAIN: 10.0, Stop.DETACHED: math.inf, None: 60.0}

log = logging.getLogger(__name__)
T = TypeVar("T")
# The adapter in a folder, trained to these metrics; None if it cannot be used.
DescribeAdapter = Callable[[Path, Mapping[str, float]], SavedAdapter | None]


class Superseded(Exception):
    """There is a newer checkpoint to store, or no time left for this one."""


class CheckpointKeeper:
    """Stores what the child saves, in a thread of its own, always the newest only.

    Whatever goes wrong here costs a checkpoint, never the run; only a lost fence ends it."""

    def __init__(self, host: Host, attempt: Attempt, folder: Path, describe_adapter: DescribeAdapter) -> None:
        self._host = host
        self._attempt = attempt
        self._folder = folder
        self._describe_adapter = describe_adapter
        self._changed = threading.Condition()
        self._resumed: ResumedMessage | None = None
        self._newest: CheckpointMessage | None = None
        self._closing = self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"keeper-{attempt.job_id.hex[:8]}", daemon=True)
        self._thread.start()

    def hear(self, message: CheckpointNews) -> None:
        """Take note of what the child told. Returns at once."""
        with self._changed:
            if isinstance(message, ResumedMessage):
                self._resumed = message
            else:
                if self._newest is not None:
                    self._remove(self._newest)
                self._newest = message
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what was heard, within the time that the end of the attempt leaves for it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        began = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < began + STORE_SECONDS[self._attempt.reason]:
            self._thread.join(0.1)  # looks again: the attempt may be told to hurry meanwhile
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._handle(message)
            except Superseded:
                log.info("%s: the checkpoint of step %d was not stored in time", self._attempt, message.step)
            except FenceLost:
                if not self._given_up:  # then the job was just given away
                    self._attempt.stop(Stop.LOST)
                return
            except Exception:
                log.warning("%s: step %d could not be kept", self._attempt, message.step, exc_info=True)

    def _next(self) -> CheckpointNews | None:
        """The next thing to do; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._resumed or self._newest)
            message: CheckpointNews | None = None
            if self._resumed is not None:
                message, self._resumed = self._resumed, None
            elif not self._given_up:
                message, self._newest = self._newest, None
            return message

    def _handle(self, message: CheckpointNews) -> None:
        if isinstance(message, ResumedMessage):
            what = f"recording the resume of {self._attempt}"
            persist(partial(self._record, message), self._pause_unless_given_up, what)
            return
        try:
            self._store(message)
        finally:
            self._remove(message)

    def _store(self, message: CheckpointMessage) -> None:
        directory = self._folder / str(message.step)
        files = [describe(directory, name) for name in CHECKPOINT_FILES]
        document = check_document(directory, message.step, files)
        adapter = self._describe_adapter(directory, message.metrics)
        if adapter is not None:
            files += [OutputFile(**file) for file in adapter.manifest["files"]]
        hit("ckpt.hashed")
        blobs: dict[str, uuid.UUID] = {}
        for file in files:
            store = partial(store_output, self._host, self._attempt, directory, file)
            blobs[file.path] = self._persist(store, f"storing {file.path} of")
            hit("ckpt.stored")
        manifest: dict[str, Any] = {
            "files": [asdict(file) for file in files],
            "fingerprint": asdict(document.fingerprint),
        }
        manifest["adapter"] = adapter.manifest if adapter else None

        def commit() -> None:
            with transaction(self._host.sessions) as session:
                commit_checkpoint(
                    session,
                    job_id=self._attempt.job_id,
                    fence=self._attempt.fence,
                    step=message.step,
                    files=blobs,
                    manifest=manifest,
                    metrics=dict(message.metrics),
                    merge_recipe=adapter.merge_recipe if adapter else None,
                )
                hit("ckpt.before_commit")
            hit("ckpt.after_commit")

        self._persist(commit, "committing a checkpoint of")
        self._attempt.news.checkpoint(message.step)

    def _record(self, message: ResumedMessage) -> None:
        with transaction(self._host.sessions) as session:
            record_resume(
                session,
                job_id=self._attempt.job_id,
                fence=self._attempt.fence,
                step=message.step,
                resume="best_effort" if message.differences else "exact",
                differences=message.differences,
            )
        self._attempt.news.checkpoint(message.step)

    def _persist(self, call: Callable[[], T], what: str) -> T:
        return persist(call, self._pause, f"{what} {self._attempt}")

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._given_up or self._newest is not None, timeout=seconds):
                raise Superseded

    def _pause_unless_given_up(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._given_up, timeout=seconds):
                raise Superseded

    def _remove(self, message: CheckpointMessage) -> None:
        shutil.rmtree(self._folder / str(message.step), ignore_errors=True)


@contextmanager
def keep_checkpoints(
    host: Host, attempt: Attempt, folder: Path, describe_adapter: DescribeAdapter
) -> Iterator[CheckpointKeeper]:
    """A keeper of what a child saves below `folder`."""
    keeper = CheckpointKeeper(host, attempt, folder, describe_adapter)
    try:
        yield keeper
    finally:
        keeper.close()


def check_document(directory: Path, step: int, files: list[OutputFile]) -> CheckpointDocument:
    """What the checkpoint says of itself; BadCheckpoint if that is not what was found."""
    document = read_document(directory)
    digests = {file.path: (file.sha256, file.size) for file in files}
    if document.step != step or digests[TENSORS_FILE] != (document.tensors_sha256, document.tensors_size):
        raise BadCheckpoint(f"the checkpoint of step {step} is not what it says")
    return document
