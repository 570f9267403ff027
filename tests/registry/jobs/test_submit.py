import hashlib
from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from registry.db import SessionFactory, transaction
from registry.errors import (
    FileInUse,
    IdempotencyKeyReused,
    InvalidHyperparameter,
    InvalidIdempotencyKey,
    QuotaExceeded,
    UnknownTargetModules,
    UnknownTrainingFile,
)
from registry.files import delete_file
from registry.jobs.idempotency import Idempotency
from registry.jobs.spec import LoraSpec, MergeOptions, TrainSpec
from registry.jobs.submit import Submitted, submit_merge
from registry.models import IdempotencyKey, Job, JobEvent, Outbox
from tests.factories import make_adapter, make_file, make_tenant, make_version
from tests.registry.jobs.helpers import Shop, claim_one, open_shop, publish, race

SCOPE = "POST /v1/fine_tuning/jobs"


def digest(body: str) -> bytes:
    return hashlib.sha256(body.encode()).digest()


def keyed(key: str = "key-1", body: str = "body") -> Idempotency:
    return Idempotency.keyed(SCOPE, key, digest(body))


def unkeyed(*, is_retry: bool, body: str = "body") -> Idempotency:
    return Idempotency.fold_retry(SCOPE, digest(body), is_retry=is_retry)


def count(sessions: SessionFactory, model: Any) -> int:
    with sessions() as session:
        return session.scalars(select(func.count()).select_from(model)).one()


def test_a_submit_commits_job_event_and_wake_together(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    job = shop.send(spec=TrainSpec(n_epochs=2)).job
    with sessions() as session:
        stored = session.get_one(Job, job.id)
        assert (stored.state, stored.kind, stored.training_file_id) == ("queued", "train", shop.training_file.id)
        assert TrainSpec.model_validate(stored.spec) == TrainSpec(n_epochs=2)
        assert session.scalars(select(Outbox.job_id)).all() == [job.id]
        assert [(e.type, e.message) for e in session.scalars(select(JobEvent))] == [("state", "The job is queued.")]


def test_a_submit_that_is_rolled_back_leaves_nothing(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    with pytest.raises(ZeroDivisionError), transaction(sessions) as session:
        shop.submit(session, idempotency=keyed())
        raise ZeroDivisionError
    assert [count(sessions, model) for model in (Job, Outbox, JobEvent, IdempotencyKey)] == [0, 0, 0, 0]
    assert shop.send(idempotency=keyed()).replayed is False


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────


def test_fifty_parallel_sends_of_one_request_make_one_job(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    results = race(*[partial(shop.send, idempotency=keyed())] * 50)
    assert not [r for r in results if not isinstance(r, Submitted)]
    answers = [r for r in results if isinstance(r, Submitted)]
    assert len({a.job.id for a in answers}) == 1
    assert sorted(a.replayed for a in answers) == [False] + [True] * 49
    assert (count(sessions, Job), count(sessions, Outbox)) == (1, 1)


def test_a_duplicate_waits_for_the_first_and_takes_over_when_it_fails(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)

    def lost() -> Submitted:
        with transaction(sessions) as session:
            shop.submit(session, idempotency=keyed())
            raise ZeroDivisionError

    for _ in range(5):
        results = race(lost, partial(shop.send, idempotency=keyed()), partial(shop.send, idempotency=keyed()))
        assert {r.job.id for r in results if isinstance(r, Submitted)} == {row.id for row in all_jobs(sessions)}


def all_jobs(sessions: SessionFactory) -> list[Job]:
    with sessions() as session:
        return list(session.scalars(select(Job)))


def test_one_key_for_two_requests_is_refused(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    shop.send(idempotency=keyed(body="one"))
    with pytest.raises(IdempotencyKeyReused):
        shop.send(idempotency=keyed(body="two"))
    assert count(sessions, Job) == 1


def test_two_tenants_may_use_the_same_key(sessions: SessionFactory) -> None:
    first, second = open_shop(sessions), open_shop(sessions)
    assert first.send(idempotency=keyed()).job.id != second.send(idempotency=keyed()).job.id


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "tab\t", "naïve", "line\n"])
def test_a_key_that_is_not_visible_ascii_is_refused(key: str) -> None:
    with pytest.raises(InvalidIdempotencyKey):
        keyed(key)


def test_a_declared_retry_is_folded_into_the_first_send(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    first = shop.send(idempotency=unkeyed(is_retry=False))
    retry = shop.send(idempotency=unkeyed(is_retry=True))
    assert (retry.replayed, retry.job.id) == (True, first.job.id)
    other = shop.send(idempotency=unkeyed(is_retry=True, body="other"))
    assert (other.replayed, other.job.id != first.job.id) == (False, True)


def test_two_first_sends_of_one_body_are_two_jobs(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    first = shop.send(idempotency=unkeyed(is_retry=False))
    second = shop.send(idempotency=unkeyed(is_retry=False))
    assert first.job.id != second.job.id
    assert shop.send(idempotency=unkeyed(is_retry=True)).job.id == second.job.id


def test_a_retry_after_ten_minutes_is_a_new_request(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    first = shop.send(idempotency=unkeyed(is_retry=False))
    with transaction(sessions) as session:
        session.execute(update(IdempotencyKey).values(created_at=text("clock_timestamp() - interval '11 minutes'")))
    late = shop.send(idempotency=unkeyed(is_retry=True))
    assert (late.replayed, late.job.id != first.job.id) == (False, True)
    assert shop.send(idempotency=unkeyed(is_retry=True)).job.id == late.job.id


def test_parallel_retries_of_a_lost_request_make_one_job(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    results = race(*[partial(shop.send, idempotency=unkeyed(is_retry=True))] * 10)
    assert len({r.job.id for r in results if isinstance(r, Submitted)}) == 1
    assert count(sessions, Job) == 1


# ── quota ────────────────────────────────────────────────────────────────────────────────────────


def test_the_quota_is_exact_under_concurrency(sessions: SessionFactory) -> None:
    shop = open_shop(sessions, max_queued=7)
    results = race(*[shop.send] * 20)
    assert sum(isinstance(r, Submitted) for r in results) == 7
    assert sum(isinstance(r, QuotaExceeded) for r in results) == 13
    assert count(sessions, Job) == 7


def test_a_request_refused_for_quota_may_be_sent_again_with_its_key(sessions: SessionFactory) -> None:
    shop = open_shop(sessions, max_queued=1)
    shop.send()
    with pytest.raises(QuotaExceeded):
        shop.send(idempotency=keyed())
    assert claim_one(sessions) is not None  # only queued jobs count
    assert shop.send(idempotency=keyed()).replayed is False


def test_merges_use_the_same_quota(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        version = make_version(session, make_adapter(session, make_tenant(session, max_queued=1)))
        submit_merge(session, version=version, options=MergeOptions())
        with pytest.raises(QuotaExceeded):
            submit_merge(session, version=version, options=MergeOptions(dtype="float32"))


# ── what is checked before a job exists ──────────────────────────────────────────────────────────


def test_unknown_target_modules_are_refused_with_what_exists(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    with pytest.raises(UnknownTargetModules) as caught:
        shop.send(spec=TrainSpec(lora=LoraSpec(target_modules=["q_proj", "c_attn"])))
    assert caught.value.details["unknown"] == ["c_attn"]
    assert caught.value.details["available"] == ["embed_tokens", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"], ["self_attn.q_proj", "model.layers.1.self_attn.o_proj"]])
def test_known_target_modules_are_accepted(sessions: SessionFactory, targets: Any) -> None:
    assert open_shop(sessions).send(spec=TrainSpec(lora=LoraSpec(target_modules=targets))).replayed is False


def test_r_may_be_as_large_as_the_smallest_dimension_and_no_larger(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    shop.send(spec=TrainSpec(lora=LoraSpec(r=32)))
    with pytest.raises(InvalidHyperparameter):
        shop.send(spec=TrainSpec(lora=LoraSpec(r=33)))


def test_files_of_an_unfinished_job_cannot_be_deleted(sessions: SessionFactory) -> None:
    shop = open_shop(sessions)
    with transaction(sessions) as session:
        validation = make_file(session, make_tenant(session), tenant_id=shop.tenant_id)
    shop.send(validation_file=validation)

    def delete(file: Any) -> None:
        with transaction(sessions) as session:
            delete_file(session, tenant_id=shop.tenant_id, file_id=file.id)

    for file in (shop.training_file, validation):
        with pytest.raises(FileInUse):
            delete(file)
    job = claim_one(sessions)
    assert job is not None
    publish(sessions, job)
    delete(validation)
    with pytest.raises(UnknownTrainingFile) as caught:
        shop.send(validation_file=validation)
    assert caught.value.param == "validation_file"


def test_of_submit_and_delete_exactly_one_wins(sessions: SessionFactory) -> None:
    for _ in range(15):
        shop = open_shop(sessions)

        def delete(shop: Shop = shop) -> str:
            with transaction(sessions) as session:
                delete_file(session, tenant_id=shop.tenant_id, file_id=shop.training_file.id)
            return "deleted"

        submitted, deleted = race(shop.send, delete)
        if deleted == "deleted":
            assert isinstance(submitted, UnknownTrainingFile)
        else:
            assert isinstance(submitted, Submitted) and isinstance(deleted, FileInUse)
