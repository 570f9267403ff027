"""JSON for input that others wrote: duplicate names, NaN, lone surrogates and bottomless nesting are refused."""

import json
from collections.abc import Iterator
from typing import Any


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON (RFC 8259, no byte order mark). Raises ValueError, whose text fits behind "the file is …"."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} cannot be decoded") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own limit, explained in Python's own terms
            raise ValueError("not JSON that can be read: a number has too many digits") from None
        raise
    if "\\ud" in text.lower() and any(_has_surrogate(string) for string in strings(value)):
        raise ValueError("malformed: a \\ud800–\\udfff escape stands alone; it is half a character")
    return value


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, names of objects included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
            stack.extend(item.keys())
        elif isinstance(item, list):
            stack.extend(item)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # add returns None on purpose
        raise ValueError(f"malformed: the name {twice[:80]!r} occurs twice in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name} has no place in it")
