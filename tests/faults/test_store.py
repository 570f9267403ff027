"""The object store refuses, breaks off, lies, or is behind a wire that does."""

import signal
from pathlib import Path

import pytest
from sqlalchemy import select

from registry.errors import ArtifactCorrupt, StorageUnavailable
from registry.models import Checkpoint, CheckpointFile
from tests.faults.checker import check
from tests.faults.s3_proxy import (
    DENIED,
    SLOW_DOWN,
    Fault,
    S3Proxy,
    error_with_200,
    flip_answer_bit,
    flip_request_bit,
    lose_answer,
    status,
    truncate_answer,
)
from tests.faults.site import Site
from tests.registry.storage.conftest import PART_BYTES, S3Server
from tests.registry.storage.sample import make_sample

LONG = pytest.mark.faults_long
PARTS = 2 * PART_BYTES + 1

FAULTS = {
    "busy": status(503, SLOW_DOWN),
    "broken": status(500),
    "denied": status(403, DENIED),
    "unheard": lose_answer,
    "flipped on the way": flip_request_bit,
}


@pytest.mark.parametrize("fault", ["unheard", *(pytest.param(f, marks=LONG) for f in FAULTS if f != "unheard")])
def test_a_put_that_fails_again_and_again_is_repeated_until_it_works(site: Site, fault: str) -> None:
    job = site.submit(steps=5)
    rule = site.wires.s3.break_("PUT", "/blobs/", FAULTS[fault], times=3)
    site.start_worker()
    site.wait_ended(job)
    check(site)
    assert rule.done > rule.times
    assert site.depot.job(job).attempt == 1


@pytest.mark.parametrize(
    "fault", [truncate_answer, *(pytest.param(f, marks=LONG) for f in (status(503, SLOW_DOWN), lose_answer))]
)
def test_a_get_that_fails_again_and_again_is_repeated_until_it_works(site: Site, fault: Fault) -> None:
    job = site.submit(steps=5)
    rule = site.wires.s3.break_("GET", "/blobs/", fault, times=3)
    site.start_worker()
    site.wait_ended(job)
    check(site)
    assert rule.done > rule.times
    assert site.depot.job(job).attempt == 1


@LONG
def test_bytes_that_arrive_damaged_are_never_trained_on(site: Site) -> None:
    job = site.submit(steps=5)
    site.wires.s3.break_("GET", "/blobs/", flip_answer_bit, times=2)
    site.start_worker()
    site.wait_ended(job)
    check(site)


def test_a_wire_that_swallows_everything_or_is_cut_is_waited_out(site: Site) -> None:
    job = site.submit(steps=30, ms=50)
    site.start_worker()
    with site.held():
        site.wait_steps(job, 3)
        site.wires.store.blackhole()
    signal.sigtimedwait([], 2)
    site.wires.store.reset()
    site.wires.store.refuse()
    site.wait(lambda: "trying again quietly" in site.said(), "the worker noticed")
    site.wires.heal()
    site.wait_ended(job)
    check(site)
    assert site.depot.job(job).attempt == 1


@pytest.mark.parametrize("steps", [40, pytest.param(400, marks=LONG)])
def test_a_cancelled_job_does_not_wait_for_a_store_that_is_away(site: Site, steps: int) -> None:
    job = site.submit(steps=steps, ms=50)
    site.start_worker()
    with site.held():
        site.wait_steps(job, 2)
        site.wires.store.refuse()
    site.wait(lambda: "trying again quietly" in site.said(), "the worker noticed")
    site.depot.cancel(job)
    site.wait_ended(job)
    site.wires.heal()
    check(site, ended_as="cancelled")


@pytest.mark.parametrize("told", ["cancel", "leave"])
def test_a_store_that_swallows_everything_holds_up_no_cancel_and_no_drain(site: Site, told: str) -> None:
    site.wires.store.blackhole()
    job = site.submit(steps=5)
    worker = site.start_worker()
    site.wait(lambda: (site.depot.job(job).progress or {}).get("phase") == "fetching", "it is fetching")
    if told == "cancel":
        site.depot.cancel(job)
        site.wait_ended(job)
        site.wires.heal()
        check(site, ended_as="cancelled")
        return
    site.leave(worker)
    assert site.state(job) == "queued"
    site.wires.heal()
    site.start_worker()
    site.wait_ended(job)
    check(site)


def test_a_newest_checkpoint_that_rotted_is_passed_over(site: Site) -> None:
    job = site.submit(steps=60, ms=50)
    worker = site.start_worker()
    with site.held():
        site.wait(lambda: len(site.checkpoints(job)) == 2, "two checkpoints")
        worker.kill()
    newest = site.checkpoints(job)[0]
    with site.sessions() as session:
        files = session.scalars(select(CheckpointFile).where(CheckpointFile.checkpoint_id == newest.id))
        site.rot(next(file.blob.key for file in files if file.path.endswith(".safetensors")))
    site.reap()
    site.start_worker()
    site.wait_ended(job)
    check(site)
    assert site.count((Checkpoint.id == newest.id) & (Checkpoint.state == "corrupt")) == 1


# ── one upload, in this process ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "method", "pattern", "fault"),
    [
        (PARTS, "POST", "uploadId=", error_with_200),
        (PARTS, "POST", "uploadId=", status(500)),
        (PARTS, "PUT", "partNumber=2", status(503, SLOW_DOWN)),
        (PARTS, "PUT", "partNumber=2", flip_request_bit),
        (PARTS, "POST", "uploads", status(503, SLOW_DOWN)),
        (1000, "PUT", "/blobs/", flip_request_bit),
        (1000, "HEAD", "/blobs/", status(500)),
    ],
)
def test_an_upload_that_cannot_work_says_so_and_leaves_nothing(
    rclone: S3Server,
    fault_bucket: str,
    tmp_path: Path,
    size: int,
    method: str,
    pattern: str,
    fault: Fault,
) -> None:
    proxy = S3Proxy(rclone.endpoint_url)
    store = rclone.store(fault_bucket, endpoint_url=f"http://127.0.0.1:{proxy.port}")
    sample = make_sample(tmp_path, size)
    proxy.break_(method, pattern, fault, times=1000)
    with pytest.raises(StorageUnavailable):
        store.put(sample.key, sample.path, **sample.facts)
    proxy.heal()
    assert list(store.list(sample.key)) == []
    store.put(sample.key, sample.path, **sample.facts)
    assert b"".join(store.open(sample.key)) == sample.data
    store.delete(sample.key)
    proxy.close()


@pytest.mark.parametrize(
    ("method", "pattern", "fault"),
    [
        ("POST", "uploadId=", lose_answer),
        ("POST", "uploadId=", error_with_200),
        ("POST", "uploads", status(500)),
        ("PUT", "partNumber=1", lose_answer),
        ("PUT", "partNumber=3", status(503, SLOW_DOWN)),
    ],
)
def test_an_upload_in_parts_survives_one_failure(
    rclone: S3Server, fault_bucket: str, tmp_path: Path, method: str, pattern: str, fault: Fault
) -> None:
    proxy = S3Proxy(rclone.endpoint_url)
    store = rclone.store(fault_bucket, endpoint_url=f"http://127.0.0.1:{proxy.port}")
    sample = make_sample(tmp_path, PARTS)
    proxy.break_(method, pattern, fault)
    store.put(sample.key, sample.path, **sample.facts)
    assert b"".join(store.open(sample.key)) == sample.data
    store.delete(sample.key)
    proxy.close()


def test_a_store_that_checks_nothing_is_caught_when_the_bytes_are_read(
    rclone: S3Server, fault_bucket: str, tmp_path: Path
) -> None:
    proxy = S3Proxy(rclone.endpoint_url)
    store = rclone.store(fault_bucket, endpoint_url=f"http://127.0.0.1:{proxy.port}")
    sample = make_sample(tmp_path, 1000)
    store.put(sample.key, sample.path, **sample.facts)
    proxy.break_("GET", "/blobs/", flip_answer_bit, times=1000)
    target = tmp_path / "fetched"
    with pytest.raises(ArtifactCorrupt):
        store.fetch(sample.key, target, **sample.facts)
    assert not target.exists()
    proxy.heal()
    store.delete(sample.key)
    proxy.close()
