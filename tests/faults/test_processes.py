"""Workers, trainers and the API are killed, stopped, starved and told to leave, in the middle of their work."""

import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from sqlalchemy import select

from registry.models import IdempotencyKey
from tests.faults.checker import check
from tests.faults.site import Api, Site
from tests.faults.toy_child import DEAF, ESCAPE

LONG = pytest.mark.faults_long


def test_a_killed_worker_is_noticed_by_another_and_its_job_goes_on(site: Site) -> None:
    job = site.submit(steps=20, ms=50)
    first = site.start_worker(DEPOT_SLOTS="1")
    with site.held():
        site.wait(lambda: site.checkpoints(job), "a checkpoint")
        trainers = first.children()
        site.start_worker()
        first.kill()
    assert trainers
    assert psutil.wait_procs(trainers, timeout=60)[1] == []
    site.wait_ended(job)
    check(site)
    assert site.depot.job(job).attempt == 2


def test_a_killed_trainer_is_replaced_at_once_by_its_own_worker(site: Site) -> None:
    job = site.submit(steps=20, ms=50)
    worker = site.start_worker()
    with site.held():
        site.wait(lambda: site.checkpoints(job), "a checkpoint")
        for trainer in worker.children():
            trainer.kill()
    site.wait_ended(job)
    check(site)
    assert (site.depot.job(job).attempt, worker.alive) == (2, True)


def test_a_process_that_escapes_its_trainer_does_not_hold_the_slot(site: Site) -> None:
    job = site.submit(steps=3, seed=ESCAPE)
    worker = site.start_worker(DEPOT_SLOTS="1")
    try:
        site.wait_ended(job)
        next_job = site.submit(steps=3, seed=2, adapter="bot-2")
        site.wait_ended(next_job)
    finally:
        said = [event.message for event in site.depot.events(job) if event.message.startswith("started ")]
        for escaped in said:
            os.kill(int(escaped.split()[1]), signal.SIGKILL)
    check(site)
    assert said
    assert worker.alive


def test_a_worker_that_is_told_to_leave_saves_and_gives_back(site: Site) -> None:
    job = site.submit(steps=40, ms=50)
    worker = site.start_worker(DEPOT_CHECKPOINT_SECONDS="3600")
    with site.held():
        site.wait_steps(job, 5)
        worker.signal(signal.SIGTERM)
        site.wait(lambda: not worker.alive, "the worker left")
    left = site.depot.job(job)
    assert (left.state, left.attempt, left.infra_failures) == ("queued", 1, 0)
    assert site.checkpoints(job)
    site.start_worker()
    site.wait_ended(job)
    check(site)


@LONG
def test_told_twice_a_worker_with_a_deaf_trainer_still_gives_back(site: Site) -> None:
    job = site.submit(steps=1000, ms=100, seed=DEAF)
    worker = site.start_worker()
    site.wait_steps(job, 2)
    for _ in range(2):
        worker.signal(signal.SIGTERM)
        signal.sigtimedwait([], 0.5)
    site.wait(lambda: not worker.alive, "the worker left")
    left = site.depot.job(job)
    assert (left.state, left.infra_failures) == ("queued", 0)
    site.depot.cancel(job)
    check(site, ended_as="cancelled")


@pytest.mark.parametrize(
    ("limit", "value"),
    [(resource.RLIMIT_FSIZE, 0), pytest.param(resource.RLIMIT_NOFILE, 0, marks=LONG)],
    ids=["disk full", "no descriptors"],
)
def test_a_worker_that_has_no_room_gets_well_by_itself(site: Site, limit: int, value: int) -> None:
    worker = site.start_worker()
    first = site.submit(steps=2)
    site.wait_ended(first)
    process = psutil.Process(worker.pid)
    before = process.rlimit(limit)
    if limit == resource.RLIMIT_NOFILE:
        value = process.num_fds() + 1
    process.rlimit(limit, (value, before[1]))
    job = site.submit(steps=5, seed=2, adapter="bot-2")
    site.wait(lambda: site.depot.job(job).infra_failures, "an attempt failed")
    process.rlimit(limit, before)
    site.wait_ended(job)
    check(site)
    assert worker.alive


def submit_until_it_works(site: Site, api: Callable[[], Api], file_id: str, key: str, seed: int) -> None:
    while True:
        try:
            if site.post_job(api(), file_id, key=key, seed=seed, steps=1, ms=1).status_code == 200:
                return
        except httpx.TransportError:
            signal.sigtimedwait([], 0.05)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=LONG)])
def test_an_api_killed_under_many_submits_makes_one_job_per_key(site: Site, rounds: int) -> None:
    file_id = site.upload()
    dice = random.Random(1)
    api: list[Api] = []
    for round_ in range(rounds):
        api[:] = [site.start_api()]
        with ThreadPoolExecutor(20) as pool:
            keys = [(f"{round_}-{n}", round_ * 100 + n) for n in range(20)]
            running = [pool.submit(submit_until_it_works, site, lambda: api[0], file_id, *key) for key in keys]
            signal.sigtimedwait([], dice.uniform(0.02, 0.3))
            api[0].process.kill()
            api[0] = site.start_api()
            for each in running:
                each.result(90)
        api[0].kill()
    with site.sessions() as session:
        named = set(session.scalars(select(IdempotencyKey.job_id)))
    assert named == set(site.all_jobs()) == set(site.accepted)
    assert len(named) == 20 * rounds


def test_an_api_told_to_leave_finishes_what_it_began(site: Site) -> None:
    api = site.start_api("submit.before_commit=sleep:1.5")
    file_id = site.upload()
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(site.post_job(api, file_id, key="k", seed=1).status_code))
    asking.start()
    site.wait(lambda: "failpoint submit.before_commit" in (site.home / "api.log").read_text(), "it began")
    api.process.signal(signal.SIGTERM)
    asking.join()
    site.wait(lambda: not api.process.alive, "the API left")
    assert answers == [200]
    site.start_worker()
    site.wait_ended(*site.accepted)
    check(site)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=LONG)])
def test_after_a_reboot_everything_finds_together_in_any_order(site: Site, seed: int) -> None:
    jobs = [site.submit(steps=20, ms=50, seed=number, adapter=f"bot-{number}") for number in (1, 2, 3)]
    worker, api = site.start_worker(), site.start_api()
    with site.held():
        site.wait(lambda: any(site.depot.job(job).progress for job in jobs), "some train")
        for stop in (site.servers.stop_postgres, site.servers.stop_valkey, worker.kill, api.kill):
            stop()
    starts = [site.servers.start_postgres, site.servers.start_valkey, site.start_worker, site.start_api]
    random.Random(seed).shuffle(starts)
    for start in starts:
        start()
        signal.sigtimedwait([], 0.5)
    site.wait_ended(*jobs)
    check(site)
