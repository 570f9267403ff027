"""The values that fields of an adapter's configuration may have. Every error is a `BadConfig` that names the field."""

import math
import re
from collections.abc import Mapping
from typing import Any

from lora_core.errors import BadConfig
from lora_core.targets import PRESETS, ends

MAX_RANK = 1024
MAX_NAMES = 10_000
_MODULE_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,31}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_rank(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise BadConfig(f"{name} must be a whole number from 1 to {MAX_RANK}, not {value!r}")


def check_alpha(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value <= 1e9:
        raise BadConfig(f"{name} must be a number above 0 and at most 1e9, not {value!r}")


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def as_strings(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else as_tuple(value)


def targets(value: Any) -> Any:
    if value in PRESETS:
        return value
    if isinstance(value, str):
        raise BadConfig(f"target_modules must be a list of names, {' or '.join(PRESETS)}, not {value[:80]!r}")
    if value == ():
        raise BadConfig("target_modules must name at least one module")
    return names("target_modules", value)


def names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_NAMES:
        raise BadConfig(f"{name} must be a list of at most {MAX_NAMES} module names")
    for item in value:
        check_path(name, item)
    return tuple(sorted(set(value)))


def layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == ():
        return None
    if not isinstance(value, tuple) or not all(type(item) is int and 0 <= item < MAX_NAMES for item in value):
        raise BadConfig("layers_to_transform must be a list of layer numbers")
    return tuple(sorted(set(value)))


def tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping) or len(value) > MAX_NAMES or ("" in value and len(value) > 1):
        raise BadConfig("trainable_token_indices must be a list of token ids, or map module names to such lists")
    for name, indices in value.items():
        if name:
            check_path("trainable_token_indices", name)
        if not isinstance(indices, (list, tuple)) or not indices:
            raise BadConfig("trainable_token_indices must name at least one token of each embedding")
        if not all(type(index) is int and index >= 0 for index in indices) or len(set(indices)) != len(indices):
            raise BadConfig("trainable_token_indices must be different numbers, none below 0")
    return {name: tuple(indices) for name, indices in sorted(value.items())}


def pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > MAX_NAMES:
        raise BadConfig(f"{name} must map at most {MAX_NAMES} module names to numbers")
    for key, item in value.items():
        check_path(name, key)
        check(f"{name}[{key!r}]", item)
    return dict(sorted(value.items()))


def check_order(name: str, pattern: Any) -> None:
    """Sorting the keys must not change which is the first to match."""
    keys = list(pattern) if isinstance(pattern, Mapping) else []
    if keys != sorted(keys) and any(not set(keys).isdisjoint([*ends(key)][1:]) for key in keys):
        raise BadConfig(f"{name} has overlapping keys in another order than PEFT writes them; sort them")


def version(value: Any) -> tuple[int, int, int]:
    """`peft_version`; (0, 0, 0) of those that did not write it, all before 0.18."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)


def check_path(name: str, value: Any) -> None:
    # PEFT reads some of these as regular expressions; a plain dotted path means the same to both.
    if not isinstance(value, str) or len(value) > 256 or not _MODULE_PATH.fullmatch(value):
        raise BadConfig(f"{name} holds {str(value)[:80]!r}, which is not a dotted module name")
