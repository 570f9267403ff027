"""What a receiver gets, over real sockets, and what becomes of what it does not get."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import select, text, update

from registry.db import SessionFactory, transaction
from registry.ids import public_id
from registry.jobs.cancel import request_cancel
from registry.jobs.clock import NOW, in_seconds, read_clock
from registry.jobs.fail import fail
from registry.models import Job, WebhookDelivery, WebhookEndpoint
from registry.webhooks import send
from registry.webhooks.deliveries import deliver_due
from registry.webhooks.endpoints import create_endpoint, rotate_secret, secret_of
from tests.factories import make_tenant
from tests.registry.jobs.helpers import claimed, publish

PEPPER = b"p" * 32
ALL: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@dataclass
class Receiver:
    """A server that answers with `statuses`, one after the other, then 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.got.append((dict(self.headers.items()), body))
            self.send_response(found.statuses.pop(0) if found.statuses else 200)
            self.send_header("Location", found.url + "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver on a busy machine is slow, and not what these tests are about."""
    monkeypatch.setattr(send, "SECONDS", 60.0)


@pytest.fixture
def listen(sessions: SessionFactory) -> Callable[..., WebhookEndpoint]:
    def make(job: Job, url: str, event_types: Any = ALL) -> WebhookEndpoint:
        with transaction(sessions) as session:
            return create_endpoint(session, tenant_id=job.tenant_id, name="ci", url=url, event_types=event_types)

    return make


def send_all(sessions: SessionFactory, **over: Any) -> int:
    return deliver_due(sessions, **{"pepper": PEPPER, "allow_lan": True, **over})


def make_due(sessions: SessionFactory) -> None:
    with transaction(sessions) as session:
        session.execute(update(WebhookDelivery).values(next_at=in_seconds(-1)))


def deliveries(sessions: SessionFactory) -> list[WebhookDelivery]:
    with sessions() as session:
        return list(session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id)))


def end(sessions: SessionFactory, job: Job, how: str) -> None:
    if how == "succeeded":
        publish(sessions, job)
        return
    with transaction(sessions) as session:
        if how == "cancelled":
            request_cancel(session, tenant_id=job.tenant_id, job_id=job.id)
        told = {"error_class": "user", "code": "c", "message": "m", "max_infra_failures": 0}
        fail(session, job_id=job.id, fence=job.fence or 0, **told)


@pytest.mark.parametrize("how", ["succeeded", "failed", "cancelled"])
def test_openais_client_accepts_what_a_receiver_gets(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint], how: str
) -> None:
    job = claimed(sessions)
    endpoint = listen(job, receiver.url + "/hook")
    end(sessions, job, how)
    assert send_all(sessions) == 1
    ((headers, body),) = receiver.got
    client = OpenAI(api_key="k")
    event: Any = client.webhooks.unwrap(body, headers, secret=secret_of(endpoint, pepper=PEPPER))
    assert (event.type, event.data.id) == (f"fine_tuning.job.{how}", public_id("ftjob", job.id))
    assert event.id == headers["webhook-id"]
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers, secret=secret_of(endpoint, pepper=PEPPER))
    assert send_all(sessions) == 0 and deliveries(sessions)[0].outcome == "200"


def test_only_those_who_asked_are_told(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    listen(job, receiver.url, ["fine_tuning.job.failed"])
    with transaction(sessions) as session:
        stranger = make_tenant(session)
        create_endpoint(session, tenant_id=stranger.id, name="x", url=receiver.url, event_types=ALL)
    end(sessions, job, "succeeded")
    assert deliveries(sessions) == []


@pytest.mark.parametrize("status", [500, 404, 302])
def test_what_was_not_accepted_is_sent_again_as_the_same_event(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint], status: int
) -> None:
    job = claimed(sessions)
    listen(job, receiver.url)
    end(sessions, job, "failed")
    receiver.statuses = [status]
    assert send_all(sessions) == 1
    (waiting,) = deliveries(sessions)
    assert (waiting.ended_at, waiting.outcome, waiting.attempts) == (None, str(status), 1)
    assert send_all(sessions) == 0  # not before its pause
    make_due(sessions)
    assert send_all(sessions) == 1
    (first, _), (second, _) = receiver.got  # and nobody followed the redirect
    assert first["webhook-id"] == second["webhook-id"]
    assert deliveries(sessions)[0].ended_at is not None


def test_an_endpoint_that_is_being_deleted_fails_no_job(
    sessions: SessionFactory, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    endpoint = listen(job, "https://hooks.example.com/")
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with ThreadPoolExecutor(1) as pool:
        with transaction(sessions) as session:
            session.delete(session.get_one(WebhookEndpoint, endpoint.id))
            session.flush()
            ended = pool.submit(publish, sessions, job)
            while not ended.done() and not session.scalars(waiting).one():
                pass
        assert ended.result().version == 1
    assert deliveries(sessions) == []


def test_after_a_day_nobody_tries_any_more(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    listen(job, receiver.url)
    end(sessions, job, "failed")
    receiver.statuses = [500]
    with transaction(sessions) as session:
        session.execute(update(WebhookDelivery).values(created_at=NOW - timedelta(hours=25)))
    assert send_all(sessions) == 1
    (given_up,) = deliveries(sessions)
    assert given_up.ended_at is not None and given_up.outcome == "500"


def test_an_address_inside_is_blocked_without_a_connection(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    listen(job, "https://rebind.example.com/")
    end(sessions, job, "failed")
    port = int(receiver.url.rpartition(":")[2])
    assert port
    assert send_all(sessions, allow_lan=False, lookup=lambda host, port: ["127.0.0.1"]) == 1
    (blocked,) = deliveries(sessions)
    assert blocked.outcome == "blocked" and blocked.ended_at is not None
    assert receiver.got == []


def test_both_secrets_sign_while_the_old_one_lives(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    endpoint = listen(job, receiver.url)
    old = secret_of(endpoint, pepper=PEPPER)
    with transaction(sessions) as session:
        rotate_secret(session, session.get_one(WebhookEndpoint, endpoint.id), keep_old=True)
    end(sessions, job, "failed")
    send_all(sessions)
    with sessions() as session:
        endpoint = session.get_one(WebhookEndpoint, endpoint.id)
        assert endpoint.old_secret_until is not None and endpoint.old_secret_until > read_clock(session)
    ((headers, body),) = receiver.got
    new = secret_of(endpoint, pepper=PEPPER)
    assert new != old
    for secret in (old, new):
        OpenAI(api_key="k").webhooks.unwrap(body, headers, secret=secret)


def test_a_reply_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send, "SECONDS", 0.3)
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                while not done.wait(0.05):
                    connection.sendall(b"H")
            except OSError:
                pass

    threading.Thread(target=drip, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with pytest.raises(OSError):
        send.deliver(url, b"{}", secrets=[b"s"], event_id="e", timestamp=1, allow_lan=True)
    done.set()
    listener.close()


def test_a_body_is_the_event_and_nothing_else(
    sessions: SessionFactory, receiver: Receiver, listen: Callable[..., WebhookEndpoint]
) -> None:
    job = claimed(sessions)
    listen(job, receiver.url)
    end(sessions, job, "failed")
    send_all(sessions)
    event = json.loads(receiver.got[0][1])
    assert set(event) == {"id", "object", "created_at", "type", "data"} and set(event["data"]) == {"id"}
    assert "authorization" not in {name.lower() for name in receiver.got[0][0]}
