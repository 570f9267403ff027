"""Random faults against the whole service while clients submit jobs. One seed decides which faults, in which order; the
history says what happened when, so that a run that failed can be understood."""

import json
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy.exc import DBAPIError

from registry.errors import JobTerminal
from tests.faults.s3_proxy import SLOW_DOWN, flip_answer_bit, flip_request_bit, lose_answer, status, truncate_answer
from tests.faults.site import Api, Site, connect_redis, resume
from tests.faults.test_kills import ON_THE_WAY
from tests.faults.zygote import Forked
from worker.errors import is_outage

WORKERS = 3
# The grace outlasts an upload that a proxy holds up, as the setting asks for.
COLLECT = {"DEPOT_GC_SECONDS": "2", "DEPOT_GC_GRACE_SECONDS": "75"}
LOSSES = (b"INSERT INTO versions", b"INSERT INTO checkpoints", b"INSERT INTO jobs", b"INSERT INTO job_attempts", b"")


@dataclass
class History:
    """JSON lines of what was done and what was answered."""

    path: Path
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, **facts: Any) -> None:
        line = {"at": round(time.monotonic() - self.began, 3), "what": what, **facts}
        with self.lock, self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Client(threading.Thread):
    """Sends its share of the jobs over the run, each under a key of its own, and again until there is an answer."""

    def __init__(self, nemesis: "Nemesis", seeds: list[int], file_id: str) -> None:
        super().__init__(name="client", daemon=True)
        self.nemesis, self.seeds, self.file_id = nemesis, seeds, file_id
        self.dice = random.Random(seeds[0])

    def run(self) -> None:
        pause = self.nemesis.seconds / len(self.seeds)
        for seed in self.seeds:
            self.nemesis.finished.wait(self.dice.uniform(0.2, 1.0) * pause)
            self.send(seed, steps=self.dice.randint(20, 150), ms=self.dice.randint(20, 80))

    def send(self, seed: int, *, steps: int, ms: int) -> None:
        while True:
            try:
                answer = self.nemesis.site.post_job(
                    self.nemesis.api, self.file_id, key=f"job-{seed}", seed=seed, steps=steps, ms=ms
                )
                self.nemesis.history.note("submit", seed=seed, status=answer.status_code, text=answer.text[:200])
                if answer.status_code == 200:
                    return
                assert answer.status_code in (500, 503), answer.text
            except httpx.TransportError as error:
                self.nemesis.history.note("submit", seed=seed, error=type(error).__name__)
            time.sleep(0.2)


class Nemesis:
    """Does one thing after another to the service, each for a moment."""

    def __init__(self, site: Site, *, seed: int, seconds: float, jobs: int, history: History) -> None:
        self.site, self.seconds, self.history = site, seconds, history
        self.dice = random.Random(seed)
        self.finished = threading.Event()
        self.cancelled: set[uuid.UUID] = set()
        self.api: Api = site.start_api()
        self.workers: list[Forked] = [self.start_worker() for _ in range(WORKERS)]
        file_id = site.upload()
        seeds = list(range(1, jobs + 1))
        self.clients = [Client(self, seeds[part::3], file_id) for part in range(3)]
        self.faults: list[Callable[[], object]] = [
            *(self.kill_worker, self.kill_worker, self.arm_worker, self.arm_worker, self.stop_worker),
            *(
                self.leave_worker,
                self.kill_trainer,
                self.stop_trainer,
                self.kill_api,
                self.cancel,
                self.merge,
                self.merge,
            ),
            *(self.stop_postgres, self.end_sessions, self.bad_postgres, self.bad_postgres, self.lose_reply),
            *(self.restart_valkey, self.flush_valkey, self.pause_valkey, self.bad_redis),
            *(self.bad_store, self.bad_s3, self.bad_s3),
        ]

    def run(self) -> None:
        """Until the time is over and every client has its answers; then everything is whole again."""
        for client in self.clients:
            client.start()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end or any(client.is_alive() for client in self.clients):
            if time.monotonic() < end:
                fault = self.dice.choice(self.faults)
                self.history.note("fault", name=fault.__name__)
                self.safely(fault)
                self.history.note("over", name=fault.__name__)
            self.heal()
            time.sleep(self.dice.uniform(0.2, 2.0))
        self.finished.set()

    def heal(self) -> None:
        self.site.wires.heal()
        self.site.servers.start_postgres()
        self.site.servers.start_valkey()
        self.workers = [worker if worker.alive else self.start_worker() for worker in self.workers]
        if not self.api.process.alive:
            self.api = self.site.start_api()
        self.safely(self.site.skip_backoffs)

    def safely(self, call: Callable[[], object]) -> None:
        """The test's own calls may meet an outage of the test's own making."""
        try:
            call()
        except DBAPIError as error:
            if not is_outage(error):
                raise

    def start_worker(self, failpoints: str = "") -> Forked:
        return self.site.start_worker(failpoints, **COLLECT)

    def pause(self, shortest: float, longest: float) -> None:
        time.sleep(self.dice.uniform(shortest, longest))

    def any_worker(self) -> Forked:
        return self.dice.choice(self.workers)

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def kill_worker(self) -> None:
        self.any_worker().kill()

    def arm_worker(self) -> None:
        """One worker is replaced by one that breaks at some point of its way."""
        place = self.dice.randrange(WORKERS)
        action = self.dice.choice(["kill9", "raise", "raise", "stop", "sleep:4"])
        armed = f"{self.dice.choice(ON_THE_WAY)}={action}@{self.dice.randint(1, 4)}"
        self.history.note("armed", failpoints=armed)
        self.workers[place].kill()
        self.workers[place] = worker = self.start_worker(armed)
        if action == "stop":
            self.pause(2, 8)
            worker.signal(signal.SIGCONT)

    def stop_worker(self) -> None:
        worker = self.any_worker()
        worker.signal(signal.SIGSTOP)
        self.pause(0.5, 6)
        worker.signal(signal.SIGCONT)

    def leave_worker(self) -> None:
        self.any_worker().signal(signal.SIGTERM)

    def kill_trainer(self) -> None:
        trainers = self.any_worker().children()
        if trainers:
            self.dice.choice(trainers).kill()

    def stop_trainer(self) -> None:
        trainers = self.any_worker().children()
        if trainers:
            chosen = self.dice.choice(trainers)
            chosen.suspend()
            self.pause(0.5, 3)
            resume(chosen.pid)

    def kill_api(self) -> None:
        self.api.process.kill()
        self.pause(0, 1)

    def cancel(self) -> None:
        if self.site.accepted:
            chosen = self.dice.choice(sorted(self.site.accepted))
            self.cancelled.add(chosen)
            try:
                self.site.depot.cancel(chosen)
            except JobTerminal:
                self.history.note("cancelled too late", job=str(chosen))

    def merge(self) -> None:
        """No fault, but work of the other kind."""
        made = [job for job in sorted(self.site.accepted) if self.site.state(job) == "succeeded"]
        if made:
            self.site.request_merge(self.dice.choice(made))

    # ── Postgres ─────────────────────────────────────────────────────────────────────────────────

    def stop_postgres(self) -> None:
        self.site.servers.stop_postgres(self.dice.choice([signal.SIGQUIT, signal.SIGINT]))
        self.pause(0, 4)

    def end_sessions(self) -> None:
        self.site.end_sessions()

    def bad_postgres(self) -> None:
        wire = self.site.wires.postgres
        self.dice.choice([wire.refuse, wire.blackhole, wire.reset, lambda: wire.delay(0.1), self.cut_postgres])()
        self.pause(0.5, 6)
        if self.dice.random() < 0.5:
            wire.reset()

    def cut_postgres(self) -> None:
        self.site.wires.postgres.reset()
        self.site.wires.postgres.cut_answers(*(self.dice.randrange(200, 20_000) for _ in range(30)))

    def lose_reply(self) -> None:
        after = self.dice.choice(LOSSES)
        self.history.note("losing", after=after.decode())
        self.site.wires.postgres.lose_reply(after=after, to=b"COMMIT", count=self.dice.randint(1, 5))
        self.pause(1, 4)

    # ── Valkey and S3 ────────────────────────────────────────────────────────────────────────────

    def restart_valkey(self) -> None:
        self.site.servers.stop_valkey()
        self.pause(0, 2)

    def flush_valkey(self) -> None:
        with connect_redis(self.site.servers) as client:
            client.flushall()

    def pause_valkey(self) -> None:
        with connect_redis(self.site.servers) as client:
            client.client_pause(3000)

    def bad_redis(self) -> None:
        wire = self.site.wires.redis
        self.dice.choice([wire.refuse, wire.blackhole, wire.reset])()
        self.pause(0.5, 4)

    def bad_store(self) -> None:
        wire = self.site.wires.store
        self.dice.choice([wire.refuse, wire.blackhole, wire.reset, lambda: wire.delay(0.2)])()
        self.pause(0.5, 4)
        wire.reset()

    def bad_s3(self) -> None:
        faults = [status(503, SLOW_DOWN), status(500), lose_answer, flip_answer_bit, flip_request_bit, truncate_answer]
        method, times = self.dice.choice(["GET", "PUT", "HEAD"]), self.dice.randint(1, 10)
        fault = self.dice.choice(faults[:3] if method == "HEAD" else faults)
        self.site.wires.s3.break_(method, "/blobs/", fault, times=times)
        self.pause(1, 4)
