"""Failpoints: a process dies, stops or loses an answer right where something had just been done."""

import ast
import signal
from pathlib import Path

import httpx
import pytest

from registry.errors import Unavailable
from registry.failpoints import arm
from registry.models import Blob
from tests.conftest import ROOT
from tests.faults.checker import check
from tests.faults.site import Site
from tests.registry.storage.conftest import PART_BYTES
from tests.registry.storage.sample import make_sample

LONG = pytest.mark.faults_long

# What the worker passes on its way from the claim to the published version.
ON_THE_WAY = (
    "claim.after_commit",
    "blob.intent",
    "blob.sent",
    "blob.stored",
    "ckpt.hashed",
    "ckpt.stored",
    "ckpt.before_commit",
    "ckpt.after_commit",
    "pub.hashed",
    "pub.validated",
    "pub.before_commit",
    "pub.after_commit",
    "work.before_cleanup",
    "outbox.after_send",
    "reaper.before_commit",
)
SOONEST = ("claim.after_commit", "ckpt.after_commit", "pub.before_commit", "pub.after_commit")
MERGE = ("merge.merged", "merge.before_commit", "merge.after_commit")
ENDINGS = ("release.after_commit", "fail.after_commit")
SUBMIT = ("submit.before_commit", "api.after_commit")
COLLECTOR = ("gc.condemned", "gc.after_delete")
MULTIPART = ("s3.part_sent", "s3.before_complete")
LOST = "another worker owns it now"
ALL = ON_THE_WAY + MERGE + ENDINGS + SUBMIT + COLLECTOR + MULTIPART


def hits_in(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "hit"]
    return [ast.literal_eval(call.args[0]) for call in named]


def test_every_failpoint_has_a_test_here() -> None:
    found = [
        name for room in ("api", "registry", "worker") for path in (ROOT / room).rglob("*.py") for name in hits_in(path)
    ]
    assert sorted(set(found)) == sorted(ALL)


def reached(site: Site, point: str) -> bool:
    log = site.home / "worker.log"
    return log.exists() and f"failpoint {point}\n" in log.read_text()


def test_nothing_happens_to_a_job_that_nobody_disturbs(site: Site) -> None:
    job = site.submit()
    site.start_worker()
    site.wait_ended(job)
    check(site)
    assert site.depot.job(job).attempt == 1


@pytest.mark.parametrize("point", [p if p in SOONEST else pytest.param(p, marks=LONG) for p in ON_THE_WAY])
def test_a_worker_killed_anywhere_loses_nothing(site: Site, point: str) -> None:
    job = site.submit(steps=8, ms=60)
    worker = site.start_worker(f"{point}=kill9@1")
    site.wait(lambda: not worker.alive, "the worker is dead")
    assert reached(site, point)
    site.reap()
    site.start_worker()
    site.wait_ended(job)
    check(site)


def test_answers_lost_everywhere_change_nothing(site: Site) -> None:
    # Nobody asked anything at the others: an error there ends the attempt, as a kill does.
    asked = ("blob.", "ckpt.before", "ckpt.after", "pub.before", "pub.after", "outbox.", "reaper.")
    points = [point for point in ON_THE_WAY if point.startswith(asked)]
    jobs = [site.submit(steps=8, ms=60, seed=seed, adapter=f"bot-{seed}") for seed in (1, 2)]
    site.start_worker(";".join(f"{point}=raise@1" for point in points))
    site.wait(lambda: all(reached(site, point) for point in points), "every answer was lost")
    site.wait_ended(*jobs)
    check(site)
    assert [site.depot.job(job).attempt for job in jobs] == [1, 1]


@pytest.mark.parametrize(
    "point",
    [*(pytest.param(p, marks=LONG) for p in ("blob.sent", "ckpt.before_commit", "pub.hashed")), "pub.before_commit"],
)
def test_an_owner_that_wakes_up_too_late_changes_nothing(site: Site, point: str) -> None:
    job = site.submit(steps=8, ms=60)
    zombie = site.start_worker(f"{point}=stop@1", DEPOT_SLOTS="1")
    site.wait(lambda: reached(site, point), "the first owner is stopped")
    # One that stopped within a transaction holds the job's row: nobody takes that away from it but Postgres.
    if point.endswith("before_commit"):
        site.end_sessions()
    site.start_worker("pub.validated=sleep:3@1", DEPOT_SLOTS="1")
    site.wait(lambda: reached(site, "pub.validated"), "the second owner is about to publish")
    zombie.signal(signal.SIGCONT)
    site.wait(lambda: LOST in site.said(), "the first owner noticed")
    site.wait_ended(job)
    check(site)
    assert site.depot.job(job).attempt == 2


@LONG
def test_a_worker_killed_after_it_gave_a_job_back_costs_no_attempt(site: Site) -> None:
    job = site.submit(steps=30, ms=50)
    worker = site.start_worker("release.after_commit=kill9@1")
    with site.held():
        site.wait_steps(job, 3)
        worker.signal(signal.SIGTERM)
        site.wait(lambda: not worker.alive, "the worker is dead")
    assert (site.state(job), site.depot.job(job).infra_failures) == ("queued", 0)
    site.start_worker()
    site.wait_ended(job)
    check(site)


def test_a_worker_killed_after_it_wrote_a_failure_wrote_it_once(site: Site) -> None:
    job = site.submit(steps=40, ms=50)
    worker = site.start_worker("fail.after_commit=kill9@1")
    with site.held():
        site.wait_steps(job, 3)
        for trainer in worker.children():
            trainer.kill()
        site.wait(lambda: not worker.alive, "the worker is dead")
    assert (site.state(job), site.depot.job(job).infra_failures) == ("queued", 1)
    site.start_worker()
    site.wait_ended(job)
    check(site)


@pytest.mark.parametrize("action", ["kill9", pytest.param("raise", marks=LONG)])
@pytest.mark.parametrize("point", [MERGE[1], *(pytest.param(point, marks=LONG) for point in (MERGE[0], MERGE[2]))])
def test_a_merge_that_is_interrupted_is_published_once(site: Site, point: str, action: str) -> None:
    trained = site.submit(steps=1)
    worker = site.start_worker(f"{point}={action}@1")
    site.wait_ended(trained)
    merge = site.request_merge(trained)
    if action == "kill9":
        site.wait(lambda: not worker.alive, "the worker is dead")
        site.reap()
        site.start_worker()
    site.wait(lambda: site.merge(merge).digest, "the merge is published")
    site.wait_ended(*site.all_jobs())
    check(site)
    assert reached(site, point)


@pytest.mark.parametrize("point", SUBMIT)
def test_a_submit_whose_api_dies_is_one_job_once_it_is_repeated(site: Site, point: str) -> None:
    file_id = site.upload()
    api = site.start_api(f"{point}=kill9@1")
    with pytest.raises(httpx.TransportError):
        site.post_job(api, file_id, key="k", seed=3)
    site.wait(lambda: not api.process.alive, "the API is dead")
    made = 0 if point == "submit.before_commit" else 1
    assert len(site.all_jobs()) == made
    again = site.start_api()
    answer = site.post_job(again, file_id, key="k", seed=3)
    assert answer.status_code == 200
    assert answer.headers.get("Idempotency-Replayed") == ("true" if made else None)
    site.start_worker()
    site.wait_ended(*site.all_jobs())
    check(site)
    assert len(site.all_jobs()) == 1


@pytest.mark.parametrize("point", [COLLECTOR[1], pytest.param(COLLECTOR[0], marks=LONG)])
@pytest.mark.parametrize("interrupt", ["kill9", pytest.param("raise", marks=LONG)])
def test_a_collection_that_is_interrupted_is_finished_by_the_next(site: Site, point: str, interrupt: str) -> None:
    site.garbage(3)
    eager = {"DEPOT_GC_SECONDS": "0.2", "DEPOT_GC_GRACE_SECONDS": "0.05"}
    worker = site.start_worker(f"{point}={interrupt}@1", **eager)
    if interrupt == "kill9":
        site.wait(lambda: not worker.alive, "the worker is dead")
        worker = site.start_worker(**eager)
    site.wait(lambda: site.count(Blob.state == "deleted") == 3, "all garbage is gone")
    worker.kill()  # so short a grace is no time for an upload
    site.start_worker()
    job = site.submit(steps=2)
    site.wait_ended(job)
    assert reached(site, point)
    check(site)


@pytest.mark.parametrize("point", MULTIPART)
def test_an_upload_in_parts_that_fails_leaves_no_object_and_can_be_repeated(
    site: Site, tmp_path: Path, point: str
) -> None:
    sample = make_sample(tmp_path, 2 * PART_BYTES + 1)
    arm(f"{point}=raise@1")
    try:
        with pytest.raises(Unavailable):
            site.store.put(sample.key, sample.path, **sample.facts)
    finally:
        arm("")
    assert list(site.store.list(sample.key)) == []
    site.store.put(sample.key, sample.path, **sample.facts)
    assert b"".join(site.store.open(sample.key)) == sample.data
    site.store.delete(sample.key)
