"""Webhook endpoints over OpenAI's own client and by hand."""

from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from registry.webhooks.endpoints import MOST_ENDPOINTS
from tests.api.conftest import bearer, refused

ADDRESS = "/v1/webhook_endpoints"
BODY: dict[str, Any] = {
    "name": "ci",
    "url": "https://hooks.example.com/depot",
    "event_types": ["fine_tuning.job.failed"],
}


def test_openais_client_manages_endpoints(server: str, key: str) -> None:
    hooks: Any = OpenAI(base_url=f"{server}/v1", api_key=key).webhooks
    made = hooks.create(**BODY)
    assert made.signing_secret.startswith("whsec_") and made.signing_secret.endswith(made.signing_secret_hint[-4:])
    assert [endpoint.id for endpoint in hooks.list()] == [made.id]
    assert hooks.update(made.id, name="other").name == "other"
    assert hooks.retrieve(made.id).name == "other"
    rotated = hooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    assert hooks.delete(made.id).deleted


def test_the_secret_is_shown_once(client: TestClient) -> None:
    made = client.post(ADDRESS, json=BODY).json()
    for response in (client.get(ADDRESS), client.get(f"{ADDRESS}/{made['id']}")):
        assert made["signing_secret"] not in response.text


@pytest.mark.parametrize(
    ("over", "code"),
    [
        ({"url": "http://hooks.example.com/"}, "webhook_not_allowed"),
        ({"url": "https://169.254.169.254/"}, "webhook_not_allowed"),
        ({"url": "https://hooks.example.com/\r\nAuthorization: x"}, "webhook_not_allowed"),
        ({"event_types": []}, "invalid_value"),
        ({"event_types": ["everything"]}, "invalid_value"),
        ({"headers": {"Authorization": "x"}}, "unknown_field"),
        ({"secret": "whsec_mine"}, "unknown_field"),
    ],
)
def test_what_cannot_be_is_refused(client: TestClient, over: dict[str, Any], code: str) -> None:
    refused(client.post(ADDRESS, json={**BODY, **over}), 422, code)


def test_a_change_is_checked_like_a_new_endpoint(client: TestClient) -> None:
    made = client.post(ADDRESS, json=BODY).json()
    refused(client.post(f"{ADDRESS}/{made['id']}", json={"url": "https://localhost/"}), 422, "webhook_not_allowed")
    assert client.get(f"{ADDRESS}/{made['id']}").json()["url"] == BODY["url"]


def test_endpoints_are_limited(client: TestClient) -> None:
    for _ in range(MOST_ENDPOINTS):
        assert client.post(ADDRESS, json=BODY).status_code == 200
    refused(client.post(ADDRESS, json=BODY), 429, "webhook_limit")


def test_another_tenants_endpoints_do_not_exist(client: TestClient, other_key: str) -> None:
    made = client.post(ADDRESS, json=BODY).json()
    assert client.get(ADDRESS, headers=bearer(other_key)).json()["data"] == []
    refused(client.delete(f"{ADDRESS}/{made['id']}", headers=bearer(other_key)), 404, "webhook_not_found")


def test_a_test_that_nobody_answers_says_so(client: TestClient) -> None:
    made = client.post(ADDRESS, json={**BODY, "url": "https://depot-test.invalid/"}).json()
    body = {"event_type": "fine_tuning.job.failed"}
    error = refused(client.post(f"{ADDRESS}/{made['id']}/test", json=body), 422, "webhook_unreachable")
    assert error["details"]["reason"] == "gaierror"
