"""Checkpoints as versions: of jobs that ended in any way, once each, and for good."""

import uuid
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select

from registry.adapters import delete_version
from registry.db import SessionFactory, transaction
from registry.errors import CheckpointNotFound, CheckpointNotPublishable, JobNotFound, VersionNotFound
from registry.gc import forget_checkpoints
from registry.jobs.cancel import request_cancel
from registry.jobs.checkpoints import commit_checkpoint, newest_checkpoints
from registry.jobs.fail import fail
from registry.jobs.lease import release
from registry.jobs.promote import Promoted, promote_checkpoint, published_as
from registry.models import Checkpoint, Job, LineageEdge, Version, VersionFile
from tests.factories import make_blob, make_tenant
from tests.registry.jobs.helpers import claimed, publish, race
from tests.registry.refs import assert_refs_match_rows

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RECIPE = '{"a": "recipe"}'


def save(sessions: SessionFactory, job: Job, step: int = 10, *, usable: bool = True) -> uuid.UUID:
    """Commits a checkpoint with an adapter in it; its id."""
    with transaction(sessions) as session:
        blobs = {name: make_blob(session, job_id=job.id) for name in ("checkpoint.json", *ADAPTER)}
        listed = [{"path": name, "size": blobs[name].size, "sha256": blobs[name].sha256} for name in ADAPTER]
        files = {name: blob.id for name, blob in blobs.items()}
    manifest: dict[str, Any] = {"files": listed, "adapter": {"files": listed, "seed": 1} if usable else None}
    with transaction(sessions) as session:
        owner = {"job_id": job.id, "fence": job.fence or 0}
        told: dict[str, Any] = {"metrics": {"train_loss": 0.5}, "merge_recipe": RECIPE}
        commit_checkpoint(session, **owner, step=step, files=files, manifest=manifest, **told)
        return newest_checkpoints(session, job.id, limit=1)[0].id


def promote(sessions: SessionFactory, job: Job, checkpoint_id: uuid.UUID, **over: Any) -> Promoted:
    with transaction(sessions) as session:
        wanted = {"tenant_id": job.tenant_id, "job_id": job.id, "checkpoint_id": checkpoint_id, **over}
        return promote_checkpoint(session, **wanted)


def end(sessions: SessionFactory, job: Job, how: str) -> None:
    owner: dict[str, Any] = {"job_id": job.id, "fence": job.fence or 0}
    with transaction(sessions) as session:
        if how == "cancelled":
            request_cancel(session, tenant_id=job.tenant_id, job_id=job.id)
            release(session, **owner)
        elif how == "failed":
            fail(session, **owner, error_class="diverged", code="c", message="m", max_infra_failures=0)


@pytest.mark.parametrize("how", ["failed", "cancelled", "running"])
def test_a_checkpoint_of_a_failed_job_becomes_a_version(sessions: SessionFactory, how: str) -> None:
    job = claimed(sessions)
    checkpoint_id = save(sessions, job)
    end(sessions, job, how)
    made = promote(sessions, job, checkpoint_id)
    assert made.created
    with sessions() as session:
        version = session.scalars(select(Version)).one()
        assert (version.version, version.job_id, version.checkpoint_id) == (1, None, checkpoint_id)
        assert version.manifest["checkpoint"] == {"job": job.id.hex, "step": 10}
        assert version.merge_recipe == RECIPE
        files = session.scalars(select(VersionFile.path).order_by(VersionFile.path)).all()
        assert files == list(ADAPTER)
        assert set(session.scalars(select(LineageEdge.relation))) >= {"based_on"}
        assert published_as(session, [checkpoint_id]) == {checkpoint_id: 1}
        assert_refs_match_rows(session)
        assert session.get_one(Job, job.id).state == how


def test_a_job_still_publishes_its_own_result(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    promote(sessions, job, save(sessions, job))
    assert publish(sessions, job).version == 2
    assert publish(sessions, job).replayed
    with sessions() as session:
        assert [(row.version, row.job_id) for row in session.scalars(select(Version).order_by(Version.version))] == [
            (1, None),
            (2, job.id),
        ]
        assert_refs_match_rows(session)


def test_many_publications_of_one_checkpoint_make_one_version(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    checkpoint_id = save(sessions, job)
    results = race(*[partial(promote, sessions, job, checkpoint_id)] * 5)
    assert sorted(isinstance(found, Promoted) and found.created for found in results) == [False] * 4 + [True]
    with sessions() as session:
        assert len(session.scalars(select(Version)).all()) == 1


def test_what_was_published_outlives_the_checkpoint(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    first, second = save(sessions, job, 10), save(sessions, job, 20)
    end(sessions, job, "failed")
    promote(sessions, job, first)
    assert forget_checkpoints(sessions, older_than=timedelta(days=1)) == 0
    assert forget_checkpoints(sessions, older_than=timedelta(0)) == 2
    assert forget_checkpoints(sessions, older_than=timedelta(0)) == 0
    with sessions() as session:
        assert_refs_match_rows(session)
        assert session.scalars(select(Version.merge_recipe)).one() == RECIPE
        assert session.scalars(select(Checkpoint.merge_recipe)).all() == [None, None]
        assert all(file.blob.refs == 1 for file in session.scalars(select(VersionFile)))
    assert not promote(sessions, job, first).created
    with pytest.raises(CheckpointNotFound):
        promote(sessions, job, second)


def test_checkpoints_of_jobs_that_may_go_on_are_not_forgotten(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    save(sessions, job)
    assert forget_checkpoints(sessions, older_than=timedelta(0)) == 0
    with transaction(sessions) as session:
        release(session, job_id=job.id, fence=job.fence or 0)
    assert forget_checkpoints(sessions, older_than=timedelta(0)) == 0


def test_an_adapter_that_is_of_no_use_is_not_published(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    with pytest.raises(CheckpointNotPublishable):
        promote(sessions, job, save(sessions, job, usable=False))


def test_what_is_not_there_is_not_published(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    checkpoint_id = save(sessions, job)
    with pytest.raises(CheckpointNotFound):
        promote(sessions, job, uuid.uuid4())
    with pytest.raises(CheckpointNotFound):
        promote(sessions, claimed(sessions), checkpoint_id)  # another job's
    with transaction(sessions) as session:
        stranger = make_tenant(session).id
    with pytest.raises(JobNotFound):
        promote(sessions, job, checkpoint_id, tenant_id=stranger)


def test_a_deleted_version_of_a_checkpoint_does_not_come_back(sessions: SessionFactory) -> None:
    job = claimed(sessions)
    checkpoint_id = save(sessions, job)
    promote(sessions, job, checkpoint_id)
    with transaction(sessions) as session:
        delete_version(session, session.scalars(select(Version)).one())
    with pytest.raises(VersionNotFound):
        promote(sessions, job, checkpoint_id)
