"""Redis says nothing, forgets everything, is full, or says everything a hundred times. It only ever delays a start."""

import time
from collections.abc import Callable

import pytest

from registry.dispatch import CeleryDispatcher
from registry.jobs.outbox import relay
from registry.models import Outbox
from tests.faults.checker import check
from tests.faults.site import Site, connect_redis

LONG = pytest.mark.faults_long
NEVER = {"DEPOT_POLL_SECONDS": "3600"}


def unsent(site: Site) -> int:
    return site.count(Outbox.sent_at.is_(None))


def test_a_broker_that_swallows_everything_delays_no_submit_and_loses_no_job(site: Site) -> None:
    site.wires.redis.blackhole()
    site.start_worker()
    api = site.start_api()
    file_id = site.upload()
    for seed in range(3):
        assert site.post_job(api, file_id, key=str(seed), seed=seed).status_code == 200
    site.wait_ended(*site.accepted)
    assert unsent(site)
    site.wires.heal()
    site.wait(lambda: not unsent(site), "the wake-ups are sent")
    check(site)


def flush(site: Site) -> None:
    with connect_redis(site.servers) as client:
        client.flushall()


def restart_empty(site: Site) -> None:
    flush(site)
    site.servers.stop_valkey()
    time.sleep(0.5)
    site.servers.start_valkey()


def reset(site: Site) -> None:
    site.wires.redis.reset()


def refuse(site: Site) -> None:
    site.wires.redis.refuse()
    time.sleep(1)
    site.wires.heal()


def pause(site: Site) -> None:
    with connect_redis(site.servers) as client:
        client.client_pause(4000)


def fill(site: Site) -> None:
    with connect_redis(site.servers) as client:
        client.config_set("maxmemory", "1")
        site.submit(steps=1, seed=77, adapter="bot-77")
        site.wait(lambda: site.count(Outbox.attempts > 0), "the relay was refused")
        client.config_set("maxmemory", "0")


@pytest.mark.parametrize(
    "fault", [restart_empty, fill, *(pytest.param(fault, marks=LONG) for fault in (flush, reset, refuse, pause))]
)
def test_wake_ups_come_through_again_after(site: Site, fault: Callable[[Site], None]) -> None:
    worker = site.start_worker(**NEVER)
    first = site.submit(steps=2)
    site.wait_ended(first)
    fault(site)
    second = site.submit(steps=2, seed=2, adapter="bot-2")
    site.wait_ended(second)
    site.wait_ended(*site.accepted)
    check(site)
    assert worker.alive


def test_a_hundred_copies_of_one_wake_up_are_one_execution(site: Site) -> None:
    job = site.submit(steps=20, ms=50)
    assert relay(site.sessions, CeleryDispatcher(site.servers.valkey.url).send) == 1
    with connect_redis(site.servers) as client:
        message = client.lindex("default", 0)
        client.lpush("default", *[message] * 99)
        worker = site.start_worker()
        site.wait_ended(job)
        site.wait(lambda: client.llen("default") == 0, "all are read")
    check(site)
    assert (site.depot.job(job).attempt, worker.alive) == (1, True)


@LONG
def test_flushing_while_jobs_wait_and_run_loses_none(site: Site) -> None:
    jobs = [site.submit(steps=10, seed=seed, adapter=f"bot-{seed}") for seed in range(8)]
    site.start_worker()
    site.wait_steps(jobs[0])
    flush(site)
    site.wait_ended(*jobs)
    check(site)
    assert {site.depot.job(job).attempt for job in jobs} == {1}
