"""Training rows, JSON lines, checked without torch.

To imitate: `{"messages": […]}`, `{"prompt", "completion"}` or `{"text"}`. To prefer one answer to another: OpenAI's
`{"input": {"messages"}, "preferred_output", "non_preferred_output"}` or `{"prompt", "chosen", "rejected"}`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_core import strict_json
from lora_core.errors import DatasetError

MAX_LINE_BYTES = 2**20
ROLES = ("system", "user", "assistant")
_SHAPE = (
    'a row is {"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or {"text": …}; '
    'for preferences {"prompt": …, "chosen": …, "rejected": …} or '
    '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}'
)
_OUTPUTS = ("preferred_output", "non_preferred_output")

Row = dict[str, Any]
Kind = Literal["messages", "prompt", "text", "preference"]


@dataclass(frozen=True)
class RowError:
    """One fault: 1-based `line`, a sentence that says how to fix it, and a JSON pointer into the row."""

    line: int
    message: str
    pointer: str = ""


@dataclass
class RowReport:
    """`rows` good rows were read, all of one `kind`; `errors` is empty, or holds the first faults."""

    rows: int = 0
    kind: Kind | None = None
    errors: list[RowError] = field(default_factory=list)


class _Fault(Exception):
    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.message, self.pointer = message, pointer


def validate_rows(lines: Iterable[bytes], *, max_errors: int = 20, max_line_bytes: int = MAX_LINE_BYTES) -> RowReport:
    """Check JSON lines as they come (a binary file will do) and stop after `max_errors` faults.

    Memory is one line. No good row at all is a fault too.
    """
    report = RowReport()
    for item in _scan(lines, max_line_bytes):
        if isinstance(item, RowError):
            report.errors.append(item)
            if len(report.errors) >= max_errors:
                return report
        else:
            report.rows += 1
            report.kind = kind_of(item)
    if not report.rows and not report.errors:
        report.errors.append(RowError(1, f"The file has no rows; {_SHAPE}, one per line."))
    return report


def read_rows(lines: Iterable[bytes], *, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row]:
    """The rows one by one; the first fault raises DatasetError."""
    for item in _scan(lines, max_line_bytes):
        if isinstance(item, RowError):
            raise DatasetError(f"line {item.line}{item.pointer and ' ' + item.pointer}: {item.message}", errors=[item])
        yield item


def kind_of(row: Row) -> Kind:
    """What a valid row is; the two shapes of preferences are one kind."""
    if "input" in row or "chosen" in row:
        return "preference"
    return "messages" if "messages" in row else "text" if "text" in row else "prompt"


def _scan(lines: Iterable[bytes], max_line_bytes: int) -> Iterator[Row | RowError]:
    kind: Kind | None = None
    blank = 0
    for number, raw in enumerate(lines, start=1):
        line = raw.rstrip(b"\r\n")
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            yield RowError(blank, "This line is empty. Remove it; only the end of the file may be blank.")
            blank = 0
        try:
            row = _parse(line, number, max_line_bytes)
            if kind is not None and kind_of(row) != kind:
                raise _Fault(f"This row has another shape than the first, which has {kind!r}. Use one per file.")
            kind = kind_of(row)
        except _Fault as fault:
            yield RowError(number, fault.message, fault.pointer)
        else:
            yield row


def _parse(line: bytes, number: int, max_line_bytes: int) -> Row:
    if len(line) > max_line_bytes:
        raise _Fault(f"This line is longer than {max_line_bytes} bytes. Split the row into shorter ones.")
    if line.startswith(b"\xef\xbb\xbf"):
        raise _Fault("The line starts with a byte order mark. Save the file as UTF-8 without BOM.")
    try:
        row = strict_json.loads(line)
    except ValueError as error:
        hint = (
            " The file looks like one JSON array; write one object per line."
            if number == 1 and line[:1] == b"["
            else ""
        )
        raise _Fault(f"The line is {error}.{hint}") from None
    if not isinstance(row, dict):
        raise _Fault(f"The line is not an object; {_SHAPE}.")
    _check_shape(row)
    return row


def _check_shape(row: Row) -> None:
    if "messages" in row:
        _names(row, {"messages"}, "")
        _check_messages(row["messages"], "/messages", last="assistant")
    elif "input" in row:
        _check_preference(row)
    elif "text" in row:
        _names(row, {"text"}, "")
        _text(row["text"], "/text", empty=False)
    elif "chosen" in row or "rejected" in row:
        _names(row, {"prompt", "chosen", "rejected"}, "")
        _text(row["prompt"], "/prompt", empty=True)
        _text(row["chosen"], "/chosen", empty=False)
        _text(row["rejected"], "/rejected", empty=False)
        _differ(row["chosen"], row["rejected"])
    elif "prompt" in row or "completion" in row:
        _names(row, {"prompt", "completion"}, "")
        _text(row["prompt"], "/prompt", empty=True)
        _text(row["completion"], "/completion", empty=False)
    else:
        raise _Fault(f"The row has neither messages nor prompt; {_SHAPE}.")


def _check_preference(row: Row) -> None:
    _names(row, {"input", *_OUTPUTS}, "")
    if not isinstance(row["input"], dict):
        raise _Fault('input must be an object {"messages": […]}.', "/input")
    _names(row["input"], {"messages"}, "/input")
    _check_messages(row["input"]["messages"], "/input/messages", last="user")
    for name in _OUTPUTS:
        if not isinstance(row[name], list) or len(row[name]) != 1:
            raise _Fault("This must be a list of one message, the assistant's answer.", f"/{name}")
        _check_messages(row[name], f"/{name}", last="assistant")
    _differ(*(row[name][0]["content"] for name in _OUTPUTS))


def _differ(preferred: str, other: str) -> None:
    if preferred == other:
        raise _Fault("Both answers are the same, so there is nothing to prefer. Remove the row.")


def _check_messages(messages: Any, where: str, *, last: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise _Fault("messages must be a list with at least one message.", where)
    for index, message in enumerate(messages):
        pointer = f"{where}/{index}"
        if not isinstance(message, dict):
            raise _Fault('A message must be an object {"role": …, "content": …}.', pointer)
        _names(message, {"role", "content"}, pointer)
        if message["role"] not in ROLES:
            raise _Fault(f"The role must be one of {', '.join(ROLES)}.", f"{pointer}/role")
        if message["role"] == "system" and index:
            raise _Fault("A system message may only come first.", f"{pointer}/role")
        _text(message["content"], f"{pointer}/content", empty=message["role"] != "assistant")
    if messages[-1]["role"] != last:
        why = "it is what the model learns" if last == "assistant" else "it is what both answers answer"
        raise _Fault(f"The last message must be the {last}'s: {why}.", pointer)


def _names(value: dict[str, Any], expected: set[str], pointer: str) -> None:
    if missing := sorted(expected - value.keys()):
        raise _Fault(f"Add the missing field {missing[0]!r}.", pointer)
    if extra := sorted(value.keys() - expected):
        name = re.sub(r"[^\w.-]", "?", extra[0])[:80]
        raise _Fault(f"Remove the field {name!r}; only {', '.join(sorted(expected))} may be here.", pointer)


def _text(value: Any, pointer: str, *, empty: bool) -> None:
    if not isinstance(value, str):
        raise _Fault("This must be a string.", pointer)
    if not value and not empty:
        raise _Fault("This text is empty, so there is nothing to learn. Fill it or remove the row.", pointer)
    if "\0" in value:
        raise _Fault("This text contains a NUL character (\\u0000). Remove it.", pointer)
