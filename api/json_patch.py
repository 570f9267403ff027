"""JSON Patch, RFC 6902: `add`, `remove` and `replace`. A patch applies as a whole or not at all."""

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from api.refusals import InvalidPatch
from api.schemas import Body

_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")


class Operation(Body):
    """One change. `add` to an object also replaces; to a list it inserts, and `-` is its end."""

    op: Literal["add", "remove", "replace"]
    path: str = Field(pattern=r"^(/[^/]*)+$", max_length=500, description="A JSON Pointer, such as /lora/r")
    value: Any = None


def apply_patch(document: Any, operations: Sequence[Operation]) -> Any:
    """A changed copy; InvalidPatch names the operation that does not fit."""
    changed = copy.deepcopy(document)
    for number, operation in enumerate(operations):
        if operation.op != "remove" and "value" not in operation.model_fields_set:
            raise InvalidPatch(f"Operation {number} needs a `value`.", param=f"patch.{number}.value")
        try:
            _apply(changed, operation)
        except (KeyError, IndexError, TypeError):
            told = f"There is nothing at {operation.path!r} to {operation.op}."
            raise InvalidPatch(told, param=f"patch.{number}.path") from None
    return changed


def _apply(document: Any, operation: Operation) -> None:
    *way, last = [step.replace("~1", "/").replace("~0", "~") for step in operation.path.split("/")[1:]]
    parent = document
    for step in way:
        parent = parent[_key(parent, step)]
    key = _key(parent, last)
    if operation.op != "add" and (key is None or (isinstance(parent, dict) and key not in parent)):
        raise KeyError(last)
    if operation.op == "remove":
        del parent[key]
    elif isinstance(parent, list) and operation.op == "add":
        _insert(parent, key, operation.value)
    else:
        parent[key] = operation.value


def _insert(items: list[Any], index: Any, value: Any) -> None:
    place = len(items) if index is None else index
    if place > len(items):
        raise IndexError(place)
    items.insert(place, value)


def _key(parent: Any, step: str) -> Any:
    """`step` as a key of `parent`: an index of a list (None for `-`, its end), a name in an object."""
    if isinstance(parent, list):
        if step == "-":
            return None
        if not _INDEX.fullmatch(step):
            raise KeyError(step)
        return int(step)
    if not isinstance(parent, dict):
        raise TypeError(step)
    return step
