"""What a child process tells its supervisor: one JSON object per line of stdout.

The child parses data that tenants uploaded, so the supervisor treats what it says as untrusted: sizes are capped,
every message must fit its schema, and anything else is dropped."""

from collections.abc import Iterator
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

MAX_LINE_BYTES = 64 * 2**10
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, nothing is wrong

Phase = Literal["loading", "tokenizing", "training", "saving", "merging", "comparing"]
ErrorClass = Literal["user", "diverged", "oom", "host_oom", "native_crash", "infra", "bug"]


Text = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Metrics = Annotated[dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")], FiniteFloat], Field(max_length=64)]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PhaseMessage(Message):
    """The child begins another part of its work."""

    type: Literal["phase"] = "phase"
    phase: Phase
    total_steps: Count | None = None


class StepMessage(Message):
    """One optimizer step, or one unit of a merge, is done."""

    type: Literal["step"] = "step"
    step: Count
    total_steps: Count
    loss: FiniteFloat | None = None
    learning_rate: FiniteFloat | None = None
    grad_norm: FiniteFloat | None = None
    tokens_per_second: FiniteFloat | None = None
    eta_seconds: FiniteFloat | None = None
    valid_loss: FiniteFloat | None = None


class NoteMessage(Message):
    """A sentence for the job's event list."""

    type: Literal["note"] = "note"
    level: Literal["info", "warn"] = "info"
    message: Text


class CheckpointMessage(Message):
    """All of the run's state after `step` lies in `checkpoints/<step>/`."""

    type: Literal["checkpoint"] = "checkpoint"
    step: Count
    metrics: Metrics = Field(default_factory=dict)


class ResumedMessage(Message):
    """The run goes on from the given checkpoint; without `differences`, with the bits it would have had anyway."""

    type: Literal["resumed"] = "resumed"
    step: Count
    differences: Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=64)]


class ResultMessage(Message):
    """The work is done; its files lie in `out/`."""

    type: Literal["result"] = "result"
    metrics: Metrics = Field(default_factory=dict)
    trained_tokens: Count | None = None


class ErrorMessage(Message):
    """The work cannot be done; `message` says what a person can do about it."""

    type: Literal["error"] = "error"
    error_class: ErrorClass
    code: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    message: Text


class AliveMessage(Message):
    """Something is done of a part that takes long and has no steps."""

    type: Literal["alive"] = "alive"


class ReadyMessage(Message):
    """The task is over, its base is proved to be unchanged, and the process would do another task on it."""

    type: Literal["ready"] = "ready"
    resident_bytes: Count


CheckpointNews = CheckpointMessage | ResumedMessage
Verdict = ResultMessage | ErrorMessage
AnyMessage = PhaseMessage | StepMessage | NoteMessage | AliveMessage | CheckpointNews | Verdict | ReadyMessage
_PARSER: TypeAdapter[AnyMessage] = TypeAdapter(Annotated[AnyMessage, Field(discriminator="type")])


def parse(line: bytes) -> AnyMessage | None:
    """The message in one line, or None for anything that is not exactly a message."""
    try:
        return _PARSER.validate_json(line)
    except ValidationError:
        return None


def write(stream: IO[bytes], message: Message) -> None:
    """One line, out at once."""
    stream.write(message.model_dump_json(exclude_none=True).encode() + b"\n")
    stream.flush()


def capped_lines(stream: IO[bytes], limit: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of `stream` of at most `limit` bytes; longer ones are skipped, and memory does not grow with them."""
    skipping = False
    while line := stream.readline(limit + 1):
        complete = line.endswith(b"\n")
        if not skipping and (complete or len(line) <= limit):
            yield line
        skipping = not complete
