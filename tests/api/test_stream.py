"""Events as they happen, over a real server; curves."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from api.refusals import TooManyStreams
from api.streams import STREAMS_PER_KEY, News, StreamLimit, Told, event_lines
from registry.db import SessionFactory, transaction
from registry.jobs.events import NewEvent, add_events
from registry.jobs.fail import fail
from registry.jobs.lease import claim, heartbeat
from registry.models import Job
from tests.api.conftest import BASE, bearer, refused, upload

Submit = Callable[..., Any]


@pytest.fixture
def web(server: str, key: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, headers=bearer(key), timeout=120) as client:
        yield client


@pytest.fixture
def running(web: httpx.Client, sessions: SessionFactory) -> tuple[str, Job]:
    file_id = upload(web).json()["id"]
    body = {"model": BASE, "training_file": file_id, "suffix": "bot"}
    job_id = web.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
    assert job is not None
    return f"/v1/fine_tuning/jobs/{job_id}", job


def tell(sessions: SessionFactory, job: Job, *messages: str) -> None:
    with transaction(sessions) as session:
        told = [NewEvent("message", "info", message) for message in messages]
        heartbeat(session, job_id=job.id, fence=job.fence or 0, lease_seconds=60, progress=None, events=told)


def end(sessions: SessionFactory, job: Job) -> None:
    with transaction(sessions) as session:
        told = {"error_class": "user", "code": "c", "message": "It broke.", "max_infra_failures": 0}
        fail(session, job_id=job.id, fence=job.fence or 0, **told)


def read(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    event: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "data" in event:
            yield event
            event = {}


def messages(events: Iterator[dict[str, str]]) -> list[str]:
    return [json.loads(event["data"])["message"] for event in events]


def test_a_stream_tells_what_was_what_comes_and_ends_with_the_job(
    web: httpx.Client, running: tuple[str, Job], sessions: SessionFactory
) -> None:
    address, job = running
    tell(sessions, job, "before")
    with web.stream("GET", f"{address}/events/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = read(response.iter_lines())
        seen = [next(events) for _ in range(3)]
        assert json.loads(seen[-1]["data"])["message"] == "before"
        tell(sessions, job, "after")
        assert json.loads(next(events)["data"])["message"] == "after"
        end(sessions, job)
        assert messages(events) == ["It broke.", "The job is failed."]


def test_a_stream_continues_behind_the_last_event(
    web: httpx.Client, running: tuple[str, Job], sessions: SessionFactory
) -> None:
    address, job = running
    tell(sessions, job, *(f"line {n}" for n in range(450)))  # more than two batches
    end(sessions, job)
    all_events = list(read(iter(web.get(f"{address}/events/stream").text.split("\n"))))
    assert len(all_events) == 454
    assert [e["id"] for e in all_events] == sorted((e["id"] for e in all_events), key=lambda text: int(text[8:]))
    rest = web.get(f"{address}/events/stream", headers={"Last-Event-ID": all_events[300]["id"]}).text
    assert [e["id"] for e in read(iter(rest.split("\n")))] == [e["id"] for e in all_events[301:]]
    seen = web.get(f"{address}/events/stream", headers={"Last-Event-ID": all_events[-1]["id"]})
    assert (seen.status_code, seen.content) == (204, b"")


def test_open_streams_hold_no_connection_and_keep_nobody_waiting(
    web: httpx.Client, running: tuple[str, Job], sessions: SessionFactory, app: Any
) -> None:
    address, job = running
    opened = [web.stream("GET", f"{address}/events/stream") for _ in range(STREAMS_PER_KEY)]
    responses = [stream.__enter__() for stream in opened]
    try:
        following = [read(response.iter_lines()) for response in responses]  # a reader that is dropped hangs up
        assert {next(events)["event"] for events in following} == {"state"}
        refused(web.get(f"{address}/events/stream"), 429, "too_many_streams")
        assert web.get(address).status_code == 200
    finally:
        for stream in opened:
            stream.__exit__(None, None, None)
    end(sessions, job)
    for _ in range(2000):  # the server notices that its clients left
        if web.get(f"{address}/events/stream").status_code == 200:
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("a closed stream kept its place")


@pytest.mark.parametrize("value", ["1", "ftevent-", "ftevent-x", "ftevent-" + "9" * 30])
def test_a_foreign_place_is_refused(client: TestClient, submit: Submit, value: str) -> None:
    address = f"/v1/fine_tuning/jobs/{submit().json()['id']}/events/stream"
    refused(client.get(address, headers={"Last-Event-ID": value}), 400, "invalid_cursor")


def collect(**options: Any) -> list[str]:
    async def run() -> list[str]:
        return [line async for line in event_lines(prefix="e-", after=0, **options)]

    return asyncio.run(run())


def test_a_silent_stream_says_that_it_lives_and_survives_an_outage() -> None:
    answers: list[Any] = [
        News([], more=False, ended=False),
        OperationalError("SELECT 1", {}, ConnectionRefusedError()),
        News([Told(7, "message", "{}")], more=False, ended=True),
    ]

    def read_next(after: int) -> News:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    lines = collect(read=read_next, poll_seconds=0.001, comment_seconds=0.0)
    assert lines == ["retry: 2000\n\n", *[": still here\n\n"] * 2, "id: e-7\nevent: message\ndata: {}\n\n"]


def test_a_stream_does_not_live_for_ever() -> None:
    assert collect(read=lambda after: News([], more=False, ended=False), lifetime_seconds=0.0) == ["retry: 2000\n\n"]


def test_a_place_is_given_back_once() -> None:
    limit = StreamLimit(per_key=1)
    limit.take("a")
    limit.take("b")
    with pytest.raises(TooManyStreams):
        limit.take("a")
    limit.give_back("a")
    limit.take("a")


def test_a_curve_has_as_many_points_as_asked_for(client: TestClient, submit: Submit, sessions: SessionFactory) -> None:
    address = f"/v1/fine_tuning/jobs/{submit().json()['id']}/metrics"
    assert client.get(address).json()["points"] == []
    with transaction(sessions) as session:
        job = claim(session, queues=["default"], worker="w", lease_seconds=60)
        assert job is not None
        points = [NewEvent("metrics", "info", "m", {"step": n, "train_loss": n / 10}) for n in range(1, 101)]
        add_events(session, job.id, job.fence, points)
    found = client.get(address, params={"points": 10}).json()["points"]
    assert [point["step"] for point in found] == list(range(10, 101, 10))
    assert found[0]["train_loss"] == {"min": 0.1, "max": 1.0, "last": 1.0}
    refused(client.get(address, params={"points": 10**9}), 422, "invalid_value")
