"""Everything at once from several threads: nothing deadlocks, and afterwards the books balance."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from registry.adapters import delete_version
from registry.db import SessionFactory, transaction
from registry.errors import DepotError
from registry.jobs.cancel import request_cancel
from registry.jobs.clock import NOW
from registry.jobs.fail import fail
from registry.jobs.idempotency import Idempotency
from registry.jobs.lease import heartbeat
from registry.jobs.outbox import relay
from registry.jobs.pause import request_pause, resume
from registry.jobs.placement import Placement
from registry.jobs.reaper import tick
from registry.jobs.spec import MergeOptions
from registry.merges import request_merge
from registry.models import Adapter, BaseModelFile, Blob, Control, File, Job, MergeFile, Version, VersionFile
from tests.registry.jobs.helpers import Shop, claim_one, expire_lease, open_shop, publish, race

THREADS, STEPS = 5, 40


class Client:
    """One thread: takes whatever step its own dice say, as any of the last owners that anybody claimed for."""

    def __init__(self, shop: Shop, owners: list[Job], seed: int) -> None:
        self.shop, self.sessions, self.dice = shop, shop.sessions, random.Random(seed)
        self.owners = owners

    @property
    def mine(self) -> list[Job]:
        return self.owners[-4:]

    def run(self) -> int:
        steps = 2 * [self.submit] + 4 * [self.claim] + 6 * [self.publish] + 2 * [self.resume]
        steps += [self.fail, self.beat, self.pause, self.expire, self.cancel]
        steps += [self.reap, self.relay, self.delete, self.merge]
        for _ in range(STEPS):
            with suppress(DepotError):  # a refusal is an answer; a deadlock or a broken rule of the database is not
                self.dice.choice(steps)()
        return STEPS

    def submit(self) -> None:
        key = self.dice.randrange(40)
        placement = Placement(priority=100 + key % 3, queue="default")
        self.shop.send(idempotency=Idempotency.keyed("s", str(key), b"same"), placement=placement)

    def claim(self) -> None:
        if job := claim_one(self.sessions):
            self.owners.append(job)

    def publish(self) -> None:
        trains = [job for job in self.mine if job.kind == "train"]
        if trains:
            publish(self.sessions, self.dice.choice(trains))

    def fail(self) -> None:
        if self.mine:
            job = self.dice.choice(self.mine)
            with transaction(self.sessions) as session:
                told = {"code": "c", "message": "m", "max_infra_failures": 10**6}
                fail(session, job_id=job.id, fence=job.fence or 0, error_class="infra", **told)

    def pause(self) -> None:
        self._switch(request_pause)

    def resume(self) -> None:
        self._switch(resume)

    def _switch(self, switch: Callable[..., Job]) -> None:
        with transaction(self.sessions) as session:
            job = self.any(session.scalars(select(Job).where(Job.finished_at.is_(None))).all())
            if job is not None:
                switch(session, tenant_id=self.shop.tenant_id, job_id=job.id)

    def expire(self) -> None:
        """As if nobody had come for a job in time, and as if every backoff had passed."""
        with transaction(self.sessions) as session:
            queued = select(Job.id).where(Job.state == "queued").with_for_update(skip_locked=True)
            session.execute(update(Job).where(Job.id.in_(queued)).values(run_after=NOW))
            one = queued.where(Job.deadline_at.is_not(None)).order_by(Job.id).limit(1)
            session.execute(update(Job).where(Job.id == one.scalar_subquery()).values(deadline_at=NOW))

    def beat(self) -> None:
        if self.mine:
            job = self.dice.choice(self.mine)
            with transaction(self.sessions) as session:
                heartbeat(session, job_id=job.id, fence=job.fence or 0, lease_seconds=60, progress={"step": 1})

    def cancel(self) -> None:
        with transaction(self.sessions) as session:
            job = self.any(session.scalars(select(Job).where(Job.finished_at.is_(None))).all())
            if job is not None:
                request_cancel(session, tenant_id=self.shop.tenant_id, job_id=job.id)

    def reap(self) -> None:
        if self.mine:
            job = self.dice.choice(self.mine)
            with self.sessions() as session:
                owned = session.get_one(Job, job.id).lease_expires_at is not None
            if owned:
                with suppress(IntegrityError):  # it ended in between, and the database said so
                    expire_lease(self.sessions, job.id)
        with transaction(self.sessions) as session:
            session.execute(update(Control).values(reaper_tick=NOW, hold_until=None))
            tick(session, lease_seconds=90, reaper_seconds=15, max_infra_failures=3)

    def relay(self) -> None:
        relay(self.sessions, lambda *_: None, limit=5)

    def delete(self) -> None:
        with transaction(self.sessions) as session:
            version = self.any(session.scalars(select(Version).where(Version.deleted_at.is_(None))).all())
            if version is not None:
                delete_version(session, version)

    def merge(self) -> None:
        with transaction(self.sessions) as session:
            version = self.any(session.scalars(select(Version).where(Version.deleted_at.is_(None))).all())
            if version is not None:
                request_merge(session, version=version, options=MergeOptions())

    def any(self, rows: Sequence[Any]) -> Any:
        return self.dice.choice(rows) if rows else None


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_everything_leaves_the_books_balanced(sessions: SessionFactory, seed: int) -> None:
    shop = open_shop(sessions, max_running=6)
    owners: list[Job] = []
    clients = [Client(shop, owners, seed * 100 + n) for n in range(THREADS)]
    assert race(*(client.run for client in clients)) == [STEPS] * THREADS
    with sessions() as session:
        versions = session.scalars(select(Version).order_by(Version.version)).all()
        assert [v.version for v in versions] == list(range(1, len(versions) + 1))
        ended_well = select(Job.id).where(Job.state == "succeeded", Job.kind == "train")
        assert {v.job_id for v in versions} == set(session.scalars(ended_well))
        assert session.scalars(select(Adapter.next_version)).one() == len(versions) + 1
        assert len(versions) > 3
        columns = (VersionFile.blob_id, MergeFile.blob_id, File.blob_id, BaseModelFile.blob_id)
        mentions = Counter(blob_id for column in columns for blob_id in session.scalars(select(column)))
        assert {blob.id: blob.refs for blob in session.scalars(select(Blob)) if blob.refs} == mentions
