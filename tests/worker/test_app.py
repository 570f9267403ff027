"""The worker as it is run in production: a Celery process on real Postgres and real Valkey."""

import base64
import json
import subprocess
import sys
from pathlib import Path

from registry.dispatch import CeleryDispatcher
from registry.jobs.outbox import relay
from tests.worker.conftest import StartWorker
from tests.worker.depot import ROOT, Depot, WorkerProcess, connect_redis, is_alive, metrics_of, wait_until, worker_env
from tests.worker.fake_child import LONG, SUCCEED


def test_sigterm_gives_the_job_back_without_a_penalty(depot: Depot, start_worker: StartWorker) -> None:
    worker = start_worker()
    job_id = depot.submit(seed=LONG)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    (child,) = worker.children()
    assert worker.terminate() == 0
    job = depot.job(job_id)
    assert (job.state, job.infra_failures, job.attempt) == ("queued", 0, 1)
    assert not is_alive(child)

    start_worker()
    wait_until(lambda: depot.job(job_id).attempt == 2 and depot.job(job_id).state == "running")


def test_sigterm_while_the_worker_starts_gives_the_job_back(depot: Depot, start_worker: StartWorker) -> None:
    job_id = depot.submit(seed=LONG)
    worker = start_worker("tests.worker.hasty_app")
    assert worker.process.wait(120) == 0
    job = depot.job(job_id)
    assert (job.state, job.infra_failures, job.attempt) == ("queued", 0, 1)


def test_kill_of_the_worker_ends_its_trainer(depot: Depot, start_worker: StartWorker) -> None:
    worker = start_worker()
    job_id = depot.submit(seed=LONG)
    wait_until(lambda: metrics_of(depot.events(job_id)))
    (child,) = worker.children()
    worker.kill()
    wait_until(lambda: not is_alive(child), what="the trainer to notice that its supervisor is dead")


def test_a_process_that_waits_for_another_job_ends_with_its_worker(depot: Depot, start_worker: StartWorker) -> None:
    worker = start_worker()
    jobs = []
    for _ in range(2):
        jobs.append(depot.submit(seed=SUCCEED))
        wait_until(lambda: depot.states(jobs) == {"succeeded"})
    (child,) = worker.children()  # one did both
    assert worker.terminate() == 0
    assert not is_alive(child)


def test_a_process_that_waits_ends_when_its_worker_is_killed(depot: Depot, start_worker: StartWorker) -> None:
    worker = start_worker()
    job_id = depot.submit(seed=SUCCEED)
    wait_until(lambda: depot.job(job_id).state == "succeeded")
    (child,) = worker.children()
    worker.kill()
    wait_until(lambda: not is_alive(child))


def test_flushing_redis_loses_no_job(depot: Depot, start_worker: StartWorker, valkey_url: str) -> None:
    jobs = [depot.submit(seed=SUCCEED, adapter=f"bot-{number}") for number in range(3)]
    with connect_redis(valkey_url) as client:
        client.flushall()  # what nobody read before the last worker was killed
        assert relay(depot.sessions, CeleryDispatcher(valkey_url).send) == len(jobs)
        assert client.llen("default") == len(jobs)
        client.flushall()
    start_worker()
    wait_until(lambda: depot.states(jobs) == {"succeeded"})


def test_an_idle_worker_is_woken_through_redis(depot: Depot, start_worker: StartWorker) -> None:
    check_wakes(depot, start_worker(poll_seconds=3600))


def test_strange_messages_are_dropped_and_the_worker_goes_on(
    depot: Depot, start_worker: StartWorker, valkey_url: str
) -> None:
    ours = {"body": b64(b'[["no-job"], {}, {}]'), "content-type": "application/json", "content-encoding": "utf-8"}
    ours["headers"] = {"task": "depot.wake", "id": "1"}
    ours["properties"] = {"delivery_tag": "1", "body_encoding": "base64", "delivery_info": {}}
    info = {"exchange": "", "routing_key": "default"}
    complete = {**ours, "properties": {**ours["properties"], "delivery_info": info}}
    with connect_redis(valkey_url) as client:
        for message in (
            b"",
            b"not JSON",
            b"\xff\xfe",
            b"[" * 10_000,
            b"[]",
            b"7",
            b"{}",
            json.dumps({**ours, "properties": []}),
            json.dumps(ours),
            json.dumps({**complete, "body": "!"}),
            json.dumps({**complete, "body": b64(b"not JSON")}),
            json.dumps({**complete, "body": b64(b'["a", "b", "c"]')}),
            json.dumps({**complete, "body": b64(b"7")}),
            json.dumps({**complete, "headers": []}),
            json.dumps({**complete, "headers": {}}),
            json.dumps({**complete, "headers": {"task": []}}),
            json.dumps({**complete, "headers": {"task": "os.system"}}),
            json.dumps({**complete, "headers": {"task": "os.system", "id": "2"}}),
            json.dumps({**complete, "headers": {"task": "depot.wake"}}),
            json.dumps({**complete, "headers": {**ours["headers"], "compression": "zlib"}}),
            json.dumps({**complete, "headers": {**ours["headers"], "eta": "never"}}),
            json.dumps({**complete, "content-type": "application/x-python-serialize", "body": b64(b"cos\nsystem\n")}),
            json.dumps({**complete, "content-type": 7}),
            json.dumps({**complete, "properties": {**complete["properties"], "delivery_tag": {}}}),
            json.dumps({**complete, "properties": {**complete["properties"], "delivery_tag": None}}),
        ):
            client.lpush("default", message)
        for tag, left in {"3": b"not JSON", "4": b"[1, 2, 3]", "5": b"{}"}.items():
            client.hset("unacked", tag, left)
            client.zadd("unacked_index", {tag: 1})
        worker = start_worker(poll_seconds=3600)

        def are_gone() -> bool:
            assert worker.process.poll() is None, "the worker ended"
            return client.llen("default") == client.hlen("unacked") == client.zcard("unacked_index") == 0

        wait_until(are_gone)
    check_wakes(depot, worker)


def test_a_redis_that_refuses_to_be_read_does_not_end_the_worker(
    depot: Depot, start_worker: StartWorker, valkey_url: str, tmp_path: Path
) -> None:
    with connect_redis(valkey_url) as client:
        client.set("default", "no list")
        worker = start_worker(poll_seconds=3600)
        wait_until(lambda: "ResponseError" in (tmp_path / "worker.log").read_text())
        client.delete("default")
    check_wakes(depot, worker)


def check_wakes(depot: Depot, worker: WorkerProcess) -> None:
    """A worker that does not poll hears of jobs through Redis."""
    for number in (1, 2):  # the first may be found by the look that every slot starts with
        job_id = depot.submit(seed=SUCCEED, adapter=f"bot-{number}")
        wait_until(lambda job_id=job_id: depot.job(job_id).state == "succeeded")
    assert worker.process.poll() is None


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_without_redis_jobs_run_by_polling_and_the_worker_still_stops(
    depot: Depot, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(redis_url=f"redis+socket://{tmp_path}/nobody.sock")
    job_id = depot.submit(seed=SUCCEED)
    wait_until(lambda: depot.job(job_id).state == "succeeded")
    assert worker.terminate() == 0


def test_the_worker_process_never_imports_torch(tmp_path: Path) -> None:
    nowhere = "postgresql+psycopg://nobody@/nothing"
    env = worker_env(database_url=nowhere, redis_url="redis://127.0.0.1:1/0", objects=tmp_path, home=tmp_path)
    code = (
        "import sys, worker.app; sys.exit(' '.join({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
