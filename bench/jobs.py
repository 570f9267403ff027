"""The job engine in real Postgres that waits for its disk: claiming from a long queue, and submitting without Redis.

Claimers are processes of their own, each with one connection, as slots of fifty workers would be: each takes a job,
gives it back, and the queue stays as long as it was. Claiming is measured without a peer. A submit is compared with
itself: beside a relay whose Redis answers, and beside one whose Redis accepts connections and says nothing."""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from bench.claimers import run_claimers
from bench.harness import Row, write
from bench.servers import empty_and_fill, servers
from bench.submits import submitting
from registry.settings import Settings

POLL_SECONDS: float = Settings.model_fields["poll_seconds"].default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--claimers", type=int, default=50)
    parser.add_argument("--poll", type=float, default=POLL_SECONDS, help="seconds between two claims of one claimer")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each claiming run")
    parser.add_argument("--submits", type=int, default=200, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-jobs-") as name, servers(Path(name)) as (database, redis):
        rows = [
            *claiming(database, options, tenants=1, poll=options.poll),
            *claiming(database, options, tenants=50, poll=options.poll),
            *claiming(database, options, tenants=50, poll=0.0),
            *submitting(database, redis, submits=options.submits, rounds=options.rounds),
        ]
    note = (
        f"Postgres with fsync and synchronous_commit on, on the same {os.cpu_count()} cores as {options.claimers} "
        f"claimer processes; {options.jobs} queued jobs. A claim is timed in Python, from the start of its transaction "
        f"to the end of its commit. Idle slots poll every {POLL_SECONDS:g} s unless told; claimers here "
        f"every {options.poll:g} s. Load average before: {load:.1f}; above the number of cores the clock says little."
    )
    write("jobs", rows, note=note)


def claiming(database: str, options: argparse.Namespace, *, tenants: int, poll: float) -> list[Row]:
    """50 claimers on a full queue; `poll` 0: each asks again at once, so that the machine is saturated."""
    empty_and_fill(database, jobs=options.jobs, tenants=tenants)
    run = run_claimers(database, claimers=options.claimers, poll=poll, seconds=options.seconds)
    how = f"{options.claimers} claimers, {tenants} tenant{'s' * (tenants > 1)}, "
    how += f"a poll every {poll:g} s" if poll else "without a pause"
    spread = f"of {len(run.milliseconds)} claims, {run.errors} errors"
    p99, waiting = run.quantile(0.99), max(run.waiting, default=0)
    mean = f"mean {statistics.mean(run.waiting or [0]):.2f} of {len(run.waiting)} looks"
    target = ("< 50 ms", p99 < 50 and not run.errors) if poll else ("none set: saturated", None)
    return [
        Row(f"claim p50: {how}", run.quantile(0.5), None, "ms", None, spread, "none set", None),
        Row(f"claim p99: {how}", p99, None, "ms", None, spread, *target),
        Row(f"claims and releases: {how}", round(run.per_second, 1), None, "1/s", None, spread, "none set", None),
        Row(f"sessions waiting for a lock, most at once: {how}", waiting, None, "", None, mean, "none set", None),
        Row(f"deadlocks: {how}", run.deadlocks, None, "", None, spread, "0", run.deadlocks == 0),
    ]


if __name__ == "__main__":
    main()
