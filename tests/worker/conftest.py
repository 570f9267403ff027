"""One tiny base for the whole run; a depot around it for each test."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.adapter import save_adapter
from lora_core.inject import inject
from lora_core.model import load_base
from registry.db import SessionFactory
from registry.jobs.spec import LoraSpec
from registry.storage import ObjectStore
from tests.tiny import make_base, randomize_adapter
from tests.worker.depot import BASE_NAME, LORA, Depot, WorkerProcess, connect_redis, make_depot, worker_env
from worker.base_cache import BaseCache
from worker.host import Host
from worker.runner import Runner
from worker.supervisor import Patience
from worker.warm import WarmPool
from worker.workspace import WorkDir

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # tiny models, and cores shared with the processes under test
    return make_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def depot(sessions: SessionFactory, store: ObjectStore, tmp_path: Path, base_dir: Path) -> Depot:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return make_depot(sessions, store, scratch, base_dir)


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training with `depot.LORA` could have made."""
    directory = tmp_path_factory.mktemp("adapter")
    model, _ = load_base(base_dir, "float32", device="cpu")
    spec = LoraSpec.model_validate(LORA)
    config = replace(spec.config(), base_model_name_or_path=BASE_NAME)
    inject(model, config, seed=0)
    save_adapter(model, config, directory)
    return randomize_adapter(directory)


@pytest.fixture
def host(depot: Depot, adapter_dir: Path, tmp_path: Path) -> Iterator[Host]:
    """A worker's parts in this process, with short leases and the fake child."""
    work = WorkDir(tmp_path / "work", "host")
    host = Host(
        name="test-host:1:abc",
        sessions=depot.sessions,
        beats=depot.sessions,
        store=depot.store,
        work=work,
        cache=BaseCache(tmp_path / "cache", depot.store),
        warm=WarmPool(slots=2, max_bytes=2**40, idle_seconds=3600.0),
        lease_seconds=4.0,
        heartbeat_seconds=0.1,
        max_infra_failures=3,
        checkpoint_seconds=3600.0,
        threads=1,
        patience=Patience(grace_seconds=0.3, stall_seconds=3600.0, detached_seconds=3600.0),
        child_argv=(sys.executable, str(Path(__file__).parent / "fake_child.py"), str(adapter_dir)),
    )
    yield host
    host.warm.close()
    assert list(work.path.iterdir()) == [], "a workspace was left behind"
    work.close()


@pytest.fixture
def runner(host: Host) -> Iterator[Runner]:
    """Two running slots."""
    runner = Runner(host, queues=["default"], slots=2, poll_seconds=0.1)
    runner.start()
    yield runner
    runner.drain()
    assert runner.join(120)


@pytest.fixture
def start_worker(
    depot: Depot, database_url: str, valkey_url: str, adapter_dir: Path, tmp_path: Path
) -> Iterator[StartWorker]:
    """Starts worker processes; what is left of them after the test is killed."""
    with connect_redis(valkey_url) as client:
        client.flushall()  # a worker that another test killed leaves what it had not read, or read and not done
    started: list[WorkerProcess] = []
    log = tmp_path / "worker.log"

    def start(
        app: str = "tests.worker.fake_app",
        *,
        redis_url: str = valkey_url,
        poll_seconds: float = 0.5,
        checkpoint_seconds: float = 600.0,
    ) -> WorkerProcess:
        env = worker_env(
            database_url=database_url,
            redis_url=redis_url,
            objects=tmp_path / "objects",
            home=tmp_path,
            poll_seconds=poll_seconds,
            checkpoint_seconds=checkpoint_seconds,
        )
        started.append(WorkerProcess({**env, "FAKE_ADAPTER": str(adapter_dir)}, log, app=app))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
    sys.stdout.write(log.read_text()[-6000:])  # pytest shows it when the test failed
