"""What a supervisor believes."""

import io
import json

import pytest

from worker.protocol import (
    AliveMessage,
    CheckpointMessage,
    ErrorMessage,
    PhaseMessage,
    ResultMessage,
    ResumedMessage,
    StepMessage,
    capped_lines,
    parse,
    write,
)


@pytest.mark.parametrize(
    "message",
    [
        PhaseMessage(phase="training", total_steps=3),
        AliveMessage(),
        StepMessage(step=1, total_steps=3, loss=0.5),
        ResultMessage(metrics={"train_loss": 0.1}, trained_tokens=4),
        ErrorMessage(error_class="user", code="bad_config", message="r is too large"),
        CheckpointMessage(step=5, metrics={"train_loss": 0.5}),
        ResumedMessage(step=5, differences=["torch 2 → 3"]),
    ],
)
def test_what_is_written_is_read(message: PhaseMessage) -> None:
    stream = io.BytesIO()
    write(stream, message)
    assert parse(stream.getvalue()) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"[]",
        b'{"type": "step"}',
        b'{"type": "step", "step": -1, "total_steps": 3}',
        b'{"type": "step", "step": 1e400, "total_steps": 3}',
        b'{"type": "step", "step": 1, "total_steps": 3, "loss": NaN}',
        b'{"type": "step", "step": 1, "total_steps": 3, "fence": 7}',
        b'{"type": "phase", "phase": "succeeded"}',
        b'{"type": "error", "error_class": "drain", "code": "x", "message": "x"}',
        b'{"type": "error", "error_class": "user", "code": "no\\nline", "message": "x"}',
        b'{"type": "result", "metrics": {"a b": 1.0}}',
        b'{"type": "checkpoint", "step": "../../etc"}',
        b'{"type": "checkpoint", "step": -5}',
        b'{"type": "resumed", "step": 5}',
        b'{"type": "note", "message": "' + b"x" * 2001 + b'"}',
        json.dumps({"type": "result", "metrics": {f"m{n}": 1.0 for n in range(65)}}).encode(),
        b"\xff\xfe",
    ],
)
def test_anything_else_is_nothing(line: bytes) -> None:
    assert parse(line) is None


def test_long_lines_are_skipped_and_those_after_them_read() -> None:
    stream = io.BytesIO(b"one\n" + b"x" * 1000 + b"\ntwo\n" + b"y" * 10 + b"\n" + b"z" * 11 + b"\nlast")
    assert list(capped_lines(stream, limit=10)) == [b"one\n", b"two\n", b"y" * 10 + b"\n", b"last"]
