"""The whole service on one machine, every wire of it in the hands of the test: Postgres, Valkey and S3 behind proxies,
the API and workers as processes of their own. The test itself reaches everything directly."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import redis
from safetensors.numpy import save_file
from sqlalchemy import ColumnElement, func, select, text, update

from cli.embedded import process as embedded
from cli.embedded.process import Server
from registry.blobs import store_file
from registry.db import SessionFactory, make_engine, make_sessions, transaction
from registry.ids import parse_id, public_id
from registry.jobs import reaper
from registry.jobs.checkpoints import newest_checkpoints
from registry.jobs.clock import NOW
from registry.jobs.spec import MergeOptions
from registry.jobs.states import OWNED
from registry.keys import create_key
from registry.merges import request_merge
from registry.models import Checkpoint, Control, Job, Merge, Version
from registry.storage import ObjectStore
from registry.storage.digests import digest_file
from tests.conftest import empty_database
from tests.faults.proxy import TcpProxy
from tests.faults.s3_proxy import S3Proxy
from tests.faults.toy_child import HELD, HIDDEN, MODULES, R, undisturbed
from tests.faults.zygote import Forked, Zygote
from tests.ports import free_port
from tests.registry.storage.conftest import S3Server
from tests.tiny import make_rows, write_jsonl
from tests.worker.depot import Depot, make_depot, upload
from worker.errors import is_outage

SECRET = "f" * 40
LORA = {"r": R, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
ROWS = make_rows(2)
DATA = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
# A lost worker is noticed soon, and yet not while a busy machine keeps it waiting.
QUICK = {
    "DEPOT_HEARTBEAT_SECONDS": "0.5",
    "DEPOT_LEASE_SECONDS": "6",
    "DEPOT_REAPER_SECONDS": "0.5",
    "DEPOT_POLL_SECONDS": "0.3",
    "DEPOT_RELAY_SECONDS": "0.2",
    "DEPOT_CHECKPOINT_SECONDS": "0.2",
    "DEPOT_SLOTS": "2",
}


@dataclass
class Servers:
    """What runs for the whole test session. Postgres may be stopped and started by a test."""

    postgres: Server
    valkey: Server
    rclone: S3Server
    zygote: Zygote

    def socket_of(self, url: str) -> str:
        return url.partition("host=")[2] + "/.s.PGSQL.5432"

    def stop_postgres(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT is what `pg_ctl stop -m immediate` sends: no goodbye, no checkpoint."""
        self.postgres.process.send_signal(number)
        self.postgres.process.wait(120)

    def start_postgres(self) -> None:
        if self.postgres.process.poll() is not None:
            self.postgres = embedded.start(self.postgres.spec, url=self.postgres.url)

    def stop_valkey(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.valkey.process.send_signal(number)
        self.valkey.process.wait(120)

    def start_valkey(self) -> None:
        if self.valkey.process.poll() is not None:
            self.valkey = embedded.start(self.valkey.spec, url=self.valkey.url)


@dataclass
class Wires:
    """One proxy per server. `s3` understands HTTP, `store` is the TCP in front of it."""

    postgres: TcpProxy
    redis: TcpProxy
    store: TcpProxy
    s3: S3Proxy

    def heal(self) -> None:
        for wire in (self.postgres, self.redis, self.store, self.s3):
            wire.heal()

    def close(self) -> None:
        for wire in (self.store, self.s3, self.redis, self.postgres):
            wire.close()


@contextmanager
def open_wires(servers: Servers) -> Iterator[Wires]:
    s3 = S3Proxy(servers.rclone.endpoint_url)
    wires = Wires(
        postgres=TcpProxy(servers.socket_of(servers.postgres.url)),
        redis=TcpProxy(servers.valkey.url.removeprefix("redis+socket://")),
        store=TcpProxy(("127.0.0.1", s3.port)),
        s3=s3,
    )
    try:
        yield wires
    finally:
        wires.close()


@dataclass(frozen=True)
class Toy:
    """What a toy trainer was asked for, and so what it has to make."""

    seed: int
    steps: int

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return undisturbed(DATA, self.seed, self.steps)


@dataclass
class Site:
    """One test's depot: an emptied database, a prefix of the bucket, a home for workers, and what was started."""

    servers: Servers
    wires: Wires
    home: Path
    bucket: str
    sessions: SessionFactory
    store: ObjectStore
    depot: Depot
    key: str
    prefix: str
    workers: list[Forked] = field(default_factory=list)
    apis: list["Api"] = field(default_factory=list)
    accepted: dict[uuid.UUID, Toy] = field(default_factory=dict)

    # ── the service's processes ──────────────────────────────────────────────────────────────────

    def env(self, failpoints: str = "", **over: str) -> dict[str, str]:
        settings = {
            **QUICK,
            "DEPOT_DATABASE_URL": f"postgresql+psycopg://depot@127.0.0.1:{self.wires.postgres.port}/depot",
            "DEPOT_REDIS_URL": f"redis://127.0.0.1:{self.wires.redis.port}/0",
            "DEPOT_STORE_URL": f"s3://{self.bucket}/{self.prefix}",
            "DEPOT_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.wires.store.port}",
            "DEPOT_S3_ACCESS_KEY_ID": self.servers.rclone.access_key_id,
            "DEPOT_S3_SECRET_ACCESS_KEY": self.servers.rclone.secret_access_key,
            "DEPOT_SECRET_KEY": SECRET,
            "DEPOT_WORK_DIR": str(self.home / "work"),
            "DEPOT_CACHE_DIR": str(self.home / "cache"),
            "DEPOT_TESTING": "true",
            "DEPOT_FAILPOINTS": failpoints,
            "DEPOT_MAX_INFRA_FAILURES": "1000",
            "PGSSLMODE": "disable",
            "PGGSSENCMODE": "disable",
            "OMP_NUM_THREADS": "1",
            **over,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEPOT_")}
        return kept | settings

    def start_worker(self, failpoints: str = "", **over: str) -> Forked:
        worker = self.servers.zygote.fork("worker", env=self.env(failpoints, **over), log=self.home / "worker.log")
        self.workers.append(worker)
        return worker

    def start_api(self, failpoints: str = "", **over: str) -> "Api":
        api = Api(self.servers.zygote, self.env(failpoints, **over), self.home / "api.log", self.key)
        self.apis.append(api)
        api.wait_ready()
        return api

    def leave(self, worker: Forked) -> bool:
        """The worker is told to leave, and does."""
        worker.signal(signal.SIGTERM)
        return bool(self.wait(lambda: not worker.alive, "the worker left"))

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────

    def submit(self, *, steps: int = 10, ms: int = 20, seed: int = 1, adapter: str = "bot") -> uuid.UUID:
        """A job that is in the queue already."""
        job_id = self.depot.submit(
            rows=ROWS, adapter=adapter, lora=LORA, n_epochs=steps, batch_size=ms, seed=seed, max_length=64
        )
        self.accepted[job_id] = Toy(seed, steps)
        return job_id

    def reap(self) -> None:
        """As if every worker that is dead now had been silent for a whole lease."""
        assert not any(worker.alive for worker in self.workers)
        with transaction(self.sessions) as session:
            past = NOW - timedelta(seconds=1)
            session.execute(update(Job).where(Job.state.in_(OWNED)).values(lease_expires_at=past))
            session.execute(update(Control).values(reaper_tick=NOW, hold_until=None))
            reaper.tick(session, lease_seconds=3, reaper_seconds=60, max_infra_failures=1000)

    def state(self, job_id: uuid.UUID) -> str:
        return self.depot.job(job_id).state

    def skip_backoffs(self) -> None:
        """What delays a requeued job is tested where it is decided."""
        with transaction(self.sessions) as session:
            due = update(Job).where(Job.state == "queued", Job.run_after > NOW, Job.paused_at.is_(None))
            session.execute(due.values(run_after=NOW), execution_options={"synchronize_session": False})

    def wait(self, fact: Callable[[], Any], what: str, *, seconds: float = 120.0) -> Any:
        """The first true answer of `fact`. Backoffs are skipped meanwhile; Postgres may be away."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.skip_backoffs()
                if answer := fact():
                    return answer
            except Exception as error:
                if not is_outage(error):
                    raise
            assert time.monotonic() < end, f"still not so after {seconds:.0f} s: {what}"
            time.sleep(0.05)

    def all_jobs(self) -> list[uuid.UUID]:
        with self.sessions() as session:
            return list(session.scalars(select(Job.id)))

    def upload(self) -> str:
        """The name of a training file of DATA."""
        return public_id(
            "file", upload(self.depot, write_jsonl(self.depot.scratch / "rows.jsonl", ROWS), "fine-tune").id
        )

    def post_job(
        self, api: "Api", file_id: str, *, key: str, seed: int, steps: int = 3, ms: int = 20
    ) -> httpx.Response:
        """A submit as a client sends it; what is accepted is remembered."""
        body = {
            "model": self.depot.base.name,
            "training_file": file_id,
            "suffix": f"bot-{seed}",
            "seed": seed,
            "hyperparameters": {"n_epochs": steps, "batch_size": ms},
            "lora": LORA,
        }
        answer = api.client.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": key})
        if answer.status_code == 200:
            job_id = parse_id("ftjob", answer.json()["id"])
            assert job_id is not None
            self.accepted[job_id] = Toy(seed, steps)
        return answer

    def request_merge(self, job_id: uuid.UUID) -> uuid.UUID:
        with transaction(self.sessions) as session:
            version = session.scalars(select(Version).where(Version.job_id == job_id)).one()
            return request_merge(session, version=version, options=MergeOptions())[0].id

    def merge(self, merge_id: uuid.UUID) -> Merge:
        with self.sessions() as session:
            return session.get_one(Merge, merge_id)

    def count(self, condition: ColumnElement[bool]) -> int:
        """Rows for which this is so."""
        with self.sessions() as session:
            return session.scalars(select(func.count()).where(condition)).one()

    def checkpoints(self, job_id: uuid.UUID) -> list[Checkpoint]:
        with self.sessions() as session:
            return newest_checkpoints(session, job_id)

    def rot(self, key: str) -> None:
        """One bit of an object turns over, behind everybody's back."""
        client, name = self.servers.rclone.client(), f"{self.prefix}/{key}"
        data = bytearray(client.get_object(Bucket=self.bucket, Key=name)["Body"].read())
        data[-1] ^= 1
        client.put_object(Bucket=self.bucket, Key=name, Body=bytes(data))

    def garbage(self, count: int) -> None:
        """Objects that nobody refers to."""
        for number in range(count):
            path = self.depot.scratch / f"garbage-{number}"
            path.write_bytes(uuid.uuid4().bytes)
            sha256, size = digest_file(path)
            store_file(self.sessions, self.store, path, sha256=sha256, size=size)

    def end_sessions(self) -> None:
        """What Postgres does to every client but this test, when an operator asks."""
        busy = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND state <> 'idle'"
        with connect_postgres(self.servers) as connection:
            connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({busy}) AS busy")

    def said(self) -> str:
        log = self.home / "worker.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_ended(self, *jobs: uuid.UUID, seconds: float = 120.0) -> None:
        ended = {"succeeded", "failed", "cancelled"}
        self.wait(lambda: self.depot.states(jobs) <= ended, "all jobs ended", seconds=seconds)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No trainer takes its last step while the block runs: jobs that train are sure to go on doing so."""
        held = self.home / HELD
        held.touch()
        try:
            yield
        finally:
            held.unlink()

    def wait_steps(self, job_id: uuid.UUID, steps: int = 1) -> None:
        self.wait(lambda: ((self.depot.job(job_id).progress or {}).get("step") or 0) >= steps, f"{steps} steps")

    def close(self) -> None:
        for worker in self.workers:
            children = worker.children()
            worker.kill()
            for child in children:
                resume(child.pid)
        for api in self.apis:
            api.kill()
        for log in sorted(self.home.glob("*.log")):  # pytest shows it when the test failed
            sys.stdout.write(f"\n{log.name}:\n{log.read_text(errors='replace')[-12000:]}")


def resume(pid: int) -> None:
    """A stopped process cannot even notice that it was orphaned."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


class Api:
    """The API process and a client of it."""

    def __init__(self, zygote: Zygote, env: Mapping[str, str], log: Path, key: str) -> None:
        port = free_port()
        self.process = zygote.fork("api", env=env, log=log, port=port)
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            trust_env=False,
            timeout=60,
        )

    def wait_ready(self) -> None:
        end = time.monotonic() + 90
        while True:
            assert self.process.alive, "the API ended"
            with suppress(httpx.TransportError):
                if self.client.get("/healthz").status_code == 200:
                    return
            assert time.monotonic() < end, "the API does not answer"
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.client.close()


def make_toy_base(folder: Path) -> Path:
    """A llama small enough for a toy: one layer, random weights, and a tokenizer that nobody reads."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    shapes = {"model.embed_tokens": (16, HIDDEN), "lm_head": (16, HIDDEN)}
    shapes |= dict.fromkeys((*MODULES, *(m.replace("q_", "k_") for m in MODULES[:1])), (HIDDEN, HIDDEN))
    tensors = {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 16}'
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@contextmanager
def open_site(servers: Servers, wires: Wires, home: Path, bucket: str, base_dir: Path) -> Iterator[Site]:
    engine = make_engine(servers.postgres.url, pool_size=20)
    sessions = make_sessions(engine)
    prefix = f"p-{uuid.uuid4().hex}"
    store = servers.rclone.store(bucket, prefix=prefix)
    (home / "scratch").mkdir(parents=True)
    try:
        depot = make_depot(sessions, store, home / "scratch", base_dir)
        with transaction(sessions) as session:
            key = create_key(session, tenant_id=depot.tenant.id, name="faults", pepper=SECRET.encode())
            session.execute(text("UPDATE tenants SET max_queued = 10000, max_running = 1000"))
        site = Site(servers, wires, home, bucket, sessions, store, depot, key, prefix)
        try:
            yield site
        finally:
            wires.heal()
            site.close()
    finally:
        servers.start_postgres()
        servers.start_valkey()
        engine.dispose()
        empty_database(engine)
        engine.dispose()
        shutil.rmtree(home, ignore_errors=True)


def connect_redis(servers: Servers) -> redis.Redis:
    return redis.Redis(unix_socket_path=servers.valkey.url.removeprefix("redis+socket://"))


def connect_postgres(servers: Servers) -> psycopg.Connection:
    return psycopg.connect(servers.postgres.url.replace("+psycopg", ""), autocommit=True)


def job_name(job_id: uuid.UUID) -> str:
    return public_id("ftjob", job_id)


@contextmanager
def every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """`call` again and again beside the block; what it raises while a server is away is its own business."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            try:
                call()
            except Exception as error:
                if not is_outage(error):
                    raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
