"""`make nemesis SEED=… MINUTES=…`, and a short one in `make faults`."""

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from registry.models import Job
from tests.faults.checker import check
from tests.faults.nemesis import History, Nemesis
from tests.faults.site import Site

SEED = int(os.environ.get("NEMESIS_SEED") or random.SystemRandom().randrange(10**6))
SECONDS = 60 * float(os.environ.get("NEMESIS_MINUTES") or 0.6)
JOBS = int(os.environ.get("NEMESIS_JOBS") or (100 if SECONDS > 120 else 25))


@pytest.mark.faults_long
@pytest.mark.timeout(SECONDS + 900)
def test_random_faults_lose_nothing_and_publish_nothing_twice(site: Site, tmp_path: Path) -> None:
    sys.stdout.write(f"\nnemesis: SEED={SEED}, {SECONDS:.0f} s, {JOBS} jobs\n")
    history = History(tmp_path / "history.jsonl")
    try:
        nemesis = Nemesis(site, seed=SEED, seconds=SECONDS, jobs=JOBS, history=history)
        nemesis.run()
        assert (len(site.accepted), site.count(Job.kind == "train")) == (JOBS, JOBS)
        site.wait_ended(*site.all_jobs(), seconds=600)
        ends = {job: site.state(job) for job in site.all_jobs()}
        assert {job for job, state in ends.items() if state != "succeeded"} <= nemesis.cancelled
        assert set(ends.values()) <= {"succeeded", "cancelled"}
        check(site, ended_as=None)
    except BaseException:
        kept = Path(tempfile.mkdtemp(prefix="nemesis-"))
        shutil.copytree(tmp_path, kept / str(SEED), ignore=shutil.ignore_patterns("cache", "work", "scratch"))
        sys.stdout.write(f"\nnemesis: SEED={SEED} failed; history and logs are in {kept}\n")
        raise
    attempts = sum(site.depot.job(job).attempt for job in site.all_jobs())
    faults = history.path.read_text().count('"what": "fault"')
    sys.stdout.write(f"nemesis: {faults} faults, {attempts} attempts, 0 lost, 0 published twice, all weights equal\n")
