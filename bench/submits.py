"""How long a submit takes while a relay beside it talks to a Redis that answers, or to one that never does."""

import multiprocessing
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from bench.harness import Row, paired, smaller_is_better
from bench.servers import PLENTY
from registry.db import make_engine, make_sessions, transaction
from registry.dispatch import CeleryDispatcher
from registry.jobs.spec import TrainSpec
from registry.jobs.submit import submit_training
from tests.factories import make_base_model, make_file, make_tenant
from worker.housekeeping import make_relay

fork = multiprocessing.get_context("fork")


def submitting(database: str, redis: str, *, submits: int, rounds: int) -> list[Row]:
    """The same submits beside a relay that delivers and beside one that waits for a Redis that never answers."""
    tails: dict[str, list[float]] = {"hole": [], "redis": []}

    def round_of(name: str, url: str) -> float:
        with relaying(database, url):
            taken = submit_many(database, submits)
        tails[name].append(sorted(taken)[int(0.99 * len(taken))])
        return statistics.median(taken)

    with black_hole() as hole:
        pair = paired(lambda: round_of("hole", hole), lambda: round_of("redis", redis), rounds=rounds)
    p99 = {name: statistics.median(found[1:]) for name, found in tails.items()}  # without the warm-up
    ratio = round(p99["redis"] / p99["hole"], 3)
    hole_ms, redis_ms = round(p99["hole"], 2), round(p99["redis"], 2)
    spread = f"medians over {rounds} rounds"
    return [
        smaller_is_better("submit p50, Redis black-holed vs answering", pair, unit="ms", at_least=0.9),
        Row("submit p99, Redis black-holed vs answering", hole_ms, redis_ms, "ms", ratio, spread, "none set", None),
    ]


def submit_many(database: str, count: int) -> list[float]:
    """Milliseconds of each of `count` submits, one after the other, each committed; of a tenant of its own."""
    engine = make_engine(database, pool_size=1)
    sessions = make_sessions(engine)
    with transaction(sessions) as session:
        tenant = make_tenant(session, name=f"submits-{uuid.uuid4()}", max_queued=PLENTY)
        base = make_base_model(session, name=f"base-{uuid.uuid4()}")
        file = make_file(session, tenant)
    taken: list[float] = []
    for _ in range(count):
        begin = time.perf_counter()
        with transaction(sessions) as session:
            submit_training(
                session,
                tenant_id=tenant.id,
                base_model=base,
                adapter_name="bench",
                training_file=file,
                validation_file=None,
                spec=TrainSpec(),
                request={},
                idempotency=None,
            )
        taken.append(1000 * (time.perf_counter() - begin))
    engine.dispose()
    return taken


@contextmanager
def relaying(database: str, redis: str) -> Iterator[None]:
    """A worker's relay with its default interval, in a process of its own, which has wake-ups to send."""
    process = fork.Process(target=relay, args=(database, redis), daemon=True)
    process.start()
    try:
        time.sleep(1.0)
        yield
    finally:
        process.terminate()
        process.join()


def relay(database: str, redis: str) -> None:
    make_relay(make_sessions(make_engine(database, pool_size=2)), CeleryDispatcher(redis).send, seconds=1.0).start()
    threading.Event().wait()


@contextmanager
def black_hole() -> Iterator[str]:
    """The address of a Redis that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"  # the kernel accepts; nobody reads
