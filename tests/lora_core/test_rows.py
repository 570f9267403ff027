import io
import json

import pytest

from lora_core.errors import DatasetError
from lora_core.rows import read_rows, validate_rows
from tests.tiny import make_rows

GOOD = b'{"prompt": "a", "completion": "b"}'


def chat(*messages):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}).encode()


def message(role, content):
    return {"role": role, "content": content}


def preference(**changes):
    row = {
        "input": {"messages": [message("user", "a")]},
        "preferred_output": [message("assistant", "yes")],
        "non_preferred_output": [message("assistant", "no")],
    }
    return json.dumps(row | changes).encode()


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "a"}', "text"),
        (b'{"prompt": "", "chosen": "a", "rejected": "b"}', "preference"),
        (preference(), "preference"),
    ],
)
def test_other_kinds_of_rows_are_known(line, kind):
    report = validate_rows([line + b"\n"] * 3)
    assert (report.rows, report.errors, report.kind) == (3, [], kind)


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_good_rows_are_counted(kind):
    report = validate_rows(json.dumps(row).encode() + b"\n" for row in make_rows(5, kind))
    assert (report.rows, report.errors, report.kind) == (5, [], "messages" if kind == "chat" else "prompt")


def test_windows_line_ends_and_a_blank_end_are_fine():
    report = validate_rows(io.BytesIO(GOOD + b"\r\n" + GOOD + b"\r\n\r\n\n"))
    assert (report.rows, report.errors) == (2, [])


@pytest.mark.parametrize(
    ("line", "pointer", "words"),
    [
        (b"{", "", "not JSON"),
        (b"[{}]", "", "not an object"),
        (b"[", "", "one object per line"),
        (b"3", "", "not an object"),
        (b"\xff{}", "", "not UTF-8"),
        (b"\xef\xbb\xbf" + GOOD, "", "byte order mark"),
        (
            b'{"prompt": "a", "prompt": "b", "completion": "c"}',
            "",
            "The line is malformed: the name 'prompt' occurs twice",
        ),
        (b'{"prompt": "a\\ud800", "completion": "c"}', "", "half a character"),
        (b'{"prompt": "a", "completion": NaN}', "", "The line is not JSON: NaN"),
        (b'{"prompt": "a", "completion": ' + b"9" * 5000 + b"}", "", "a number has too many digits."),
        (b"{}", "", "neither messages nor prompt"),
        (b'{"prompt": "a"}', "", "'completion'"),
        (b'{"completion": "a"}', "", "'prompt'"),
        (b'{"prompt": "a", "completion": ""}', "/completion", "nothing to learn"),
        (b'{"prompt": 1, "completion": "b"}', "/prompt", "string"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', "/prompt", "NUL"),
        (b'{"prompt": "a", "completion": "b", "weight": 1}', "", "'weight'"),
        (b'{"messages": [], "tools": []}', "", "'tools'"),
        (b'{"messages": []}', "/messages", "at least one"),
        (b'{"messages": {}}', "/messages", "list"),
        (b'{"messages": ["a"]}', "/messages/0", "object"),
        (b'{"messages": [{"role": "user"}]}', "/messages/0", "'content'"),
        (b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "/messages/0", "'name'"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "/messages/0/role", "one of"),
        (b'{"text": ""}', "/text", "nothing to learn"),
        (b'{"text": "a", "prompt": "b"}', "", "'prompt'"),
        (b'{"prompt": "a", "chosen": "b"}', "", "'rejected'"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', "", "nothing to prefer"),
        (b'{"prompt": "a", "chosen": "", "rejected": "b"}', "/chosen", "empty"),
        (b'{"input": "a"}', "", "'non_preferred_output'"),
        (preference(input="a"), "/input", "object"),
        (preference(input={"messages": [message("assistant", "a")]}), "/input/messages/0", "the user's"),
        (preference(preferred_output=[]), "/preferred_output", "one message"),
        (preference(preferred_output=[message("user", "a")]), "/preferred_output/0", "assistant"),
        (preference(preferred_output=[message("assistant", "no")]), "", "nothing to prefer"),
        (chat(("robot", "a")), "/messages/0/role", "system, user, assistant"),
        (chat(("user", "a")), "/messages/0", "last message"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "/messages/1/role", "first"),
        (chat(("user", "a"), ("assistant", "")), "/messages/1/content", "nothing to learn"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "/messages/0/content", "string"),
        (b'{"prompt": "%s", "completion": "b"}' % (b"a" * 2**20), "", "longer than"),
        (b"[" * 100_000, "", "nested"),
    ],
)
def test_a_bad_line_is_one_error_with_its_place_and_its_cure(line, pointer, words):
    errors = validate_rows([line + b"\n"]).errors
    assert [(error.line, error.pointer) for error in errors] == [(1, pointer)]
    assert words in errors[0].message


def test_a_blank_line_between_rows_is_an_error():
    errors = validate_rows([GOOD, b"\n", GOOD]).errors
    assert [error.line for error in errors] == [2]


def test_both_shapes_in_one_file_are_an_error():
    errors = validate_rows([GOOD, chat(("user", "a"), ("assistant", "b"))]).errors
    assert [(error.line, "another shape" in error.message) for error in errors] == [(2, True)]


@pytest.mark.parametrize("lines", [[], [b"\n"]])
def test_a_file_without_rows_is_an_error(lines):
    assert "no rows" in validate_rows(lines).errors[0].message


def test_reading_stops_after_the_allowed_number_of_errors():
    lines = iter([b"{"] * 100)
    assert len(validate_rows(lines, max_errors=3).errors) == 3
    assert len(list(lines)) == 97


def test_reading_rows_raises_at_the_first_fault_with_its_line():
    rows = read_rows([GOOD, b"{"])
    assert next(rows) == {"prompt": "a", "completion": "b"}
    with pytest.raises(DatasetError, match="line 2"):
        next(rows)
