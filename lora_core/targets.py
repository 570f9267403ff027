"""By which names an adapter's configuration means which modules of a model: PEFT's rules, as functions of names."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

ALL_LINEAR: Final = "all-linear"
PAPER: Final = "paper"
PRESETS = (ALL_LINEAR, PAPER)
OUTPUT_LAYER = "lm_head"
# Query and value projections, which the paper adapts (arXiv:2106.09685, section 4.2), as families call them. Where
# they are fused with the keys, the fused layer stands for them.
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
)
FUSED = tuple(names[0] for names in QUERY_AND_VALUE if len(names) == 1)
_LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")


def matches(path: str, name: str) -> bool:
    """PEFT's rule for lists of names: the whole path or a dotted end of it."""
    return path == name or path.endswith("." + name)


def ends(path: str) -> Iterator[str]:
    """Every name that `matches` the path, the whole path first."""
    while True:
        yield path
        _, dot, path = path.partition(".")
        if not dot:
            return


def with_parents(path: str) -> Iterator[str]:
    """The path, then the module that holds it, and so on up."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def lookup(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that PEFT would match: a dotted end of the path, or with ^ all of it."""
    found = [key for key in (f"^{path}", *ends(path)) if key in pattern]
    if len(found) < 2:
        return pattern[found[0]] if found else default
    return next(value for key, value in pattern.items() if key in found)


def is_in_layers(path: str, name: str, layers: Sequence[int] | None, patterns: Sequence[str]) -> bool:
    """Whether `path`, matched by `name`, is in one of `layers` (None: anywhere).

    The number of a layer is the first in the path, or the one after one of `patterns`. A name that is the whole path
    is meant whatever its layer, as in PEFT.
    """
    if not layers or path == name:
        return True
    rules = [re.compile(rf"(?:^|.*?\.){re.escape(pattern)}\.(?P<number>\d+)\.") for pattern in patterns] or [_LAYER]
    found = next(filter(None, (rule.match(path) for rule in rules)), None)
    return found is not None and int(found["number"]) in layers


def saving(path: str, names: Iterable[str]) -> str | None:
    """The name in `modules_to_save` because of which `path` is, or is part of, a module saved whole."""
    found = names_of(path)
    return next((name for name in names if name in found), None)


def names_of(path: str) -> set[str]:
    """Every name that `matches` the path or a module that it is part of."""
    return {end for parent in with_parents(path) for end in ends(parent)}


def saved_module(path: str, names: Iterable[str]) -> str | None:
    """The module saved whole that `path` is, or is part of. PEFT takes any name that ends like one of `names`, even
    within a word."""
    ending = tuple(names)
    return next((parent for parent in [*with_parents(path)][::-1] if ending and parent.endswith(ending)), None)


def query_and_value(paths: Iterable[str]) -> tuple[str, ...]:
    """What the paper adapts, by the names that these modules have; empty if none of the known ones are there."""
    last = {path.rpartition(".")[2] for path in paths}
    return next((names for names in QUERY_AND_VALUE if last.issuperset(names)), ())
