"""A depot behind a real server, what to fill it with, and a wire that breaks where a test wants it to."""

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from api.main import create_app
from registry.blobs import store_file
from registry.db import SessionFactory, transaction
from registry.ids import parse_id
from registry.jobs.events import NewEvent, add_events
from registry.jobs.fail import fail
from registry.jobs.lease import claim
from registry.jobs.publish import publish_version
from registry.models import Job
from registry.settings import Settings
from registry.storage import ObjectStore
from registry.storage.digests import digest_file


@contextmanager
def serve(settings: Settings, listener: socket.socket) -> Iterator[None]:
    """The API on `listener`, in a thread."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=120)
        app.state.depot.engine.dispose()


@dataclass
class Depot:
    """One depot and the commands' way to it."""

    url: str
    key: str
    wire: "Wire"
    sessions: SessionFactory
    store: ObjectStore
    scratch: Path

    @property
    def env(self) -> dict[str, str]:
        return {"DEPOT_URL": self.url, "DEPOT_API_KEY": self.key, "DEPOT_HOME": str(self.scratch / "no-home")}

    def claim(self, job_id: str) -> int:
        """Makes the job run, as a worker would; returns its fence."""
        with transaction(self.sessions) as session:
            job = claim(session, queues=["default"], worker="test", lease_seconds=300)
            assert job is not None and job.id == parse_id("ftjob", job_id)
            assert job.fence is not None
            return job.fence

    def tell(self, job_id: str, fence: int, *events: NewEvent) -> None:
        with transaction(self.sessions) as session:
            add_events(session, _uuid(job_id), fence, events)

    def publish(self, job_id: str, fence: int, files: dict[str, bytes], *, recipe: str | None = None) -> int:
        """Ends the job with a version that has these files."""
        blobs = {}
        for name, data in files.items():
            path = self.scratch / f"blob-{uuid.uuid4().hex}"
            path.write_bytes(data)
            sha256, size = digest_file(path)
            blobs[name] = store_file(
                self.sessions, self.store, path, sha256=sha256, size=size, job_id=_uuid(job_id), fence=fence
            )
        with transaction(self.sessions) as session:
            return publish_version(
                session,
                job_id=_uuid(job_id),
                fence=fence,
                files=blobs,
                manifest={"files": sorted(files)},
                metrics={"train_loss": 1.25},
                trained_tokens=1000,
                merge_recipe=recipe,
            ).version

    def fail(self, job_id: str, fence: int, message: str) -> None:
        with transaction(self.sessions) as session:
            fail(
                session,
                job_id=_uuid(job_id),
                fence=fence,
                error_class="user",
                code="bad",
                message=message,
                max_infra_failures=3,
            )

    def job(self, job_id: str) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, _uuid(job_id))


def _uuid(job_id: str) -> uuid.UUID:
    found = parse_id("ftjob", job_id)
    assert found is not None
    return found


@dataclass
class Wire:
    """A TCP relay. `cut(start, after)`: the answer to the next request that begins with `start` breaks off after so
    many bytes. `seen`: the head of every request."""

    upstream: tuple[str, int]
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    seen: list[bytes] = field(default_factory=list)
    cuts: list[tuple[bytes, int]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def cut(self, start: bytes, after: int) -> None:
        self.cuts.append((start, after))

    def count(self, start: bytes) -> int:
        return sum(line.startswith(start) for line in self.seen)

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.upstream)
            budget: list[int] = []
            start(self._requests, client, server, budget)
            start(self._answers, client, server, budget)

    def _requests(self, client: socket.socket, server: socket.socket, budget: list[int]) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if b" HTTP/1.1\r\n" in data[:2000]:
                    self.seen.append(data.split(b"\r\n\r\n", 1)[0])
                for found in [cut for cut in self.cuts if data.startswith(cut[0])][:1]:
                    self.cuts.remove(found)
                    budget.append(found[1])
                server.sendall(data)
        _close(client, server)

    def _answers(self, client: socket.socket, server: socket.socket, budget: list[int]) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if budget:
                    client.sendall(data[: budget[0]])
                    budget[0] -= len(data)
                    if budget[0] <= 0:
                        break
                else:
                    client.sendall(data)
        _close(client, server)


def start(target: Callable[..., Any], *args: Any) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
