"""Running an ended job again, as it was, as it suggests, or as the caller says."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.json_patch import Operation, apply_patch
from api.refusals import InvalidPatch
from registry.db import SessionFactory, transaction
from registry.jobs.fail import fail
from registry.jobs.lease import claim
from tests.api.conftest import bearer, refused

Submit = Callable[..., Any]


@pytest.fixture
def fail_next(sessions: SessionFactory) -> Callable[..., None]:
    def fail_job(error_class: Any, code: str = "some_code") -> None:
        with transaction(sessions) as session:
            job = claim(session, queues=["default"], worker="w", lease_seconds=60)
            assert job is not None
            told = {"error_class": error_class, "code": code, "message": "It broke.", "max_infra_failures": 0}
            fail(session, job_id=job.id, fence=job.fence or 0, **told)

    return fail_job


def retry(client: TestClient, job_id: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return client.post(f"/v1/fine_tuning/jobs/{job_id}/retry", json=body, headers=headers)


METHOD = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 6}}}


@pytest.mark.parametrize(
    ("over", "error_class", "patch", "field", "value"),
    [
        ({}, "diverged", ("/lora", {"learning_rate": 1e-4}), "learning_rate", 1e-4),
        ({"lora": {"r": 4}}, "diverged", ("/lora/learning_rate", 1e-4), "learning_rate", 1e-4),
        ({"lora": {"learning_rate": 0.5}}, "diverged", ("/lora/learning_rate", 0.25), "learning_rate", 0.25),
        (
            {"hyperparameters": {"learning_rate_multiplier": 10.0}},
            "diverged",
            ("/lora", {"learning_rate": 1e-4}),
            "learning_rate",
            1e-3,
        ),
        ({}, "oom", ("/hyperparameters", {"batch_size": 4}), "batch_size", 4),
        ({"method": METHOD}, "oom", ("/method/supervised/hyperparameters/batch_size", 3), "batch_size", 3),
        ({"hyperparameters": {"batch_size": 1}}, "oom", ("/lora", {"max_length": 1024}), "max_length", 1024),
        ({"hyperparameters": {"batch_size": 1}, "lora": {"max_length": 200}}, "oom", None, None, None),
        ({"lora": {"max_length": 16}}, "no_trainable_tokens", ("/lora/max_length", 64), "max_length", 64),
        ({"lora": {"max_length": 100}}, "no_trainable_tokens", ("/lora/max_length", 128), "max_length", 128),
        ({"lora": {"max_length": 128}}, "no_trainable_tokens", None, None, None),  # all that the base can read
        ({}, "user", None, None, None),
    ],
)
def test_a_failure_suggests_what_a_rule_knows(
    client: TestClient,
    submit: Submit,
    fail_next: Callable[..., None],
    over: dict[str, Any],
    error_class: str,
    patch: tuple[str, Any] | None,
    field: str | None,
    value: Any,
) -> None:
    job_id = submit(**over).json()["id"]
    fail_next("user" if error_class == "no_trainable_tokens" else error_class, code=error_class)
    suggested = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["error"]["suggested_patch"]
    if patch is None:
        assert suggested is None
        refused(retry(client, job_id, patch="suggested"), 422, "no_suggestion")
        return
    assert suggested == [{"op": "add", "path": patch[0], "value": patch[1]}]
    again = retry(client, job_id, patch="suggested").json()
    assert (again["lora"] | again["hyperparameters"])[field] == pytest.approx(value)


def test_a_retry_is_a_new_job_that_knows_the_old_one(
    client: TestClient, submit: Submit, fail_next: Callable[..., None]
) -> None:
    old = submit(lora={"r": 4}, metadata={"team": "a"}).json()
    fail_next("user")
    new = retry(client, old["id"]).json()
    assert new["id"] != old["id"] and new["retry_of"] == old["id"] and new["state"] == "queued"
    assert {name: new[name] for name in ("lora", "seed", "metadata", "adapter", "training_file")} == {
        name: old[name] for name in ("lora", "seed", "metadata", "adapter", "training_file")
    }
    assert client.get(f"/v1/fine_tuning/jobs/{old['id']}").json()["state"] == "failed"


def test_a_patch_of_ones_own(client: TestClient, submit: Submit, fail_next: Callable[..., None]) -> None:
    job_id = submit(lora={"r": 4, "lora_dropout": 0.5}).json()["id"]
    fail_next("user")
    patch = [
        {"op": "replace", "path": "/lora/r", "value": 2},
        {"op": "remove", "path": "/lora/lora_dropout"},
        {"op": "add", "path": "/seed", "value": 7},
    ]
    new = retry(client, job_id, patch=patch).json()
    assert (new["lora"]["r"], new["lora"]["lora_dropout"], new["seed"]) == (2, 0.0, 7)


def test_a_patch_makes_no_request_that_could_not_be_sent(
    client: TestClient, submit: Submit, fail_next: Callable[..., None]
) -> None:
    job_id = submit().json()["id"]
    fail_next("user")
    patch = [{"op": "add", "path": "/image", "value": "evil"}]
    assert refused(retry(client, job_id, patch=patch), 422, "unknown_field")["param"] == "image"
    patch = [{"op": "add", "path": "/lora", "value": {"r": 0}}]
    assert refused(retry(client, job_id, patch=patch), 422, "invalid_hyperparameter")["param"] == "lora.r"
    patch = [{"op": "remove", "path": "/lora"}]
    assert refused(retry(client, job_id, patch=patch), 422, "invalid_patch")["param"] == "patch.0.path"
    refused(retry(client, job_id, patch=[{"op": "move", "path": "/a", "from": "/b"}]), 422, "invalid_value")


def test_only_what_has_ended_is_run_again(client: TestClient, submit: Submit) -> None:
    refused(retry(client, submit().json()["id"]), 409, "job_not_ended")


def test_a_retry_sent_twice_is_one_job(client: TestClient, submit: Submit, fail_next: Callable[..., None]) -> None:
    job_id = submit().json()["id"]
    fail_next("user")
    first, second = (retry(client, job_id, {"Idempotency-Key": "k"}) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotency-replayed"] == "true"


def test_another_tenants_job_is_not_run_again(
    client: TestClient, submit: Submit, fail_next: Callable[..., None], other_key: str
) -> None:
    job_id = submit().json()["id"]
    fail_next("user")
    refused(retry(client, job_id, bearer(other_key)), 404, "job_not_found")


DOCUMENT = {"a": {"b": [1, 2]}, "x/y": {"~": 0}}


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ({"op": "add", "path": "/a/b/0", "value": 0}, {"a": {"b": [0, 1, 2]}, "x/y": {"~": 0}}),
        ({"op": "add", "path": "/a/b/-", "value": 3}, {"a": {"b": [1, 2, 3]}, "x/y": {"~": 0}}),
        ({"op": "replace", "path": "/x~1y/~0", "value": None}, {"a": {"b": [1, 2]}, "x/y": {"~": None}}),
        ({"op": "remove", "path": "/a/b/1"}, {"a": {"b": [1]}, "x/y": {"~": 0}}),
        ({"op": "replace", "path": "/a/c", "value": 1}, None),
        ({"op": "remove", "path": "/a/b/2"}, None),
        ({"op": "remove", "path": "/a/b/-"}, None),
        ({"op": "add", "path": "/a/b/3", "value": 1}, None),
        ({"op": "add", "path": "/a/b/01", "value": 1}, None),
        ({"op": "add", "path": "/a/b/0/c", "value": 1}, None),
        ({"op": "add", "path": "/q/c", "value": 1}, None),
        ({"op": "add", "path": "/q"}, None),
    ],
)
def test_patches_follow_rfc_6902(operation: dict[str, Any], result: Any) -> None:
    before = repr(DOCUMENT)
    if result is None:
        with pytest.raises(InvalidPatch):
            apply_patch(DOCUMENT, [Operation.model_validate(operation)])
    else:
        assert apply_patch(DOCUMENT, [Operation.model_validate(operation)]) == result
    assert repr(DOCUMENT) == before
