import json
import socket
import uuid
from collections.abc import Iterator

import pytest
from kombu import Connection
from kombu.exceptions import OperationalError

from registry.dispatch import CeleryDispatcher


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A broker that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as deaf:  # it has the port and does not listen
        deaf.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"


def test_a_wake_arrives_by_task_name_with_the_job_id_only(valkey_url: str) -> None:
    job_id, queue = uuid.uuid4(), f"q-{uuid.uuid4().hex}"
    CeleryDispatcher(valkey_url).send(queue, job_id)
    with Connection(valkey_url) as connection:
        message = connection.SimpleQueue(queue).get(timeout=60)
    args, kwargs, _ = json.loads(message.body) if isinstance(message.body, (str, bytes)) else message.payload
    assert (message.headers["task"], args, kwargs) == ("depot.wake", [str(job_id)], {})
    assert message.content_type == "application/json"


def test_a_broker_that_never_answers_raises(black_hole: str) -> None:
    dispatcher = CeleryDispatcher(black_hole)
    for _ in range(2):  # the second call meets the connection that the first one left
        with pytest.raises(OperationalError):
            dispatcher.send("default", uuid.uuid4())


def test_a_broker_that_is_down_raises(closed_port: str) -> None:
    with pytest.raises(OperationalError):
        CeleryDispatcher(closed_port).send("default", uuid.uuid4())
