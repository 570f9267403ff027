"""What a merge is asked for, on the command line and on the wire."""

import math
import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

from lora_core.merge_options import MAX_SCALE, MAX_SHARD_SIZE, MIN_SHARD_SIZE, Start

Dtype = Literal["base", "float32", "bfloat16", "float16"]
_SIZE = re.compile(r"([0-9]{1,15})\s?(|[KMGT]i?)B?", re.IGNORECASE)
_POWERS = " kmgt"


class MergeDtype(StrEnum):
    """Of merged weights; `base` keeps the base model's own."""

    BASE = "base"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class MergeStart(StrEnum):
    """What the change is added to."""

    ORIGINAL = "original"
    NF4 = "nf4"


@dataclass(frozen=True)
class MergeOptions:
    """As the service knows them; equal options give equal bytes, wherever the merge is made."""

    dtype: Dtype = "base"
    scale: float = 1.0
    shard_size: int | None = None
    start: Start = "original"

    def as_json(self) -> dict[str, Any]:
        """Without what is left to the service."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def bytes_of(text: str) -> int:
    """A size such as 65536, 500MB or 2GiB; what is none, or out of bounds, is a usage error."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter("write a number of bytes, such as 65536, 500MB or 2GiB")
    unit = found[2].lower()
    size: int = int(found[1]) * (1024 if unit.endswith("i") else 1000) ** _POWERS.index(unit[:1] or " ")
    if not MIN_SHARD_SIZE <= size <= MAX_SHARD_SIZE:
        raise typer.BadParameter(f"{text} is {size} bytes; {MIN_SHARD_SIZE} to {MAX_SHARD_SIZE} are accepted")
    return size


def scale_of(text: str | float) -> float:
    """A number within bounds, which NaN is not; else a usage error."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        raise typer.BadParameter(f"write a number from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return scale


DtypeOption = Annotated[MergeDtype, typer.Option(help="Of the merged weights.")]
ScaleOption = Annotated[
    float,
    typer.Option(parser=scale_of, metavar="NUMBER", help="What the change is multiplied by; 1 is what was trained."),
]
ShardSizeOption = Annotated[
    int | None,
    typer.Option(parser=bytes_of, metavar="SIZE", help="Of the files of weights, such as 2GB. Default: as the base's."),
]
StartOption = Annotated[
    MergeStart,
    typer.Option(help="nf4: add the change to what 4 bits leave of the base, which QLoRA trained on."),
]
