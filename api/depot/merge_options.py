"""The options of a merge as query parameters, for merges that are computed while they are read."""

from typing import Annotated

from fastapi import Depends, Query

from lora_core.merge_options import MAX_SCALE, MAX_SHARD_SIZE, MIN_SHARD_SIZE, Start
from registry.jobs.spec import MergeDtype, MergeOptions

DtypeQuery = Annotated[MergeDtype, Query(description="Of the merged weights; `base` keeps the base model's own")]
ScaleQuery = Annotated[
    float, Query(ge=-MAX_SCALE, le=MAX_SCALE, description="What the change is multiplied by; 1 is what was trained")
]
ShardSizeQuery = Annotated[
    int | None,
    Query(
        ge=MIN_SHARD_SIZE,
        le=MAX_SHARD_SIZE,
        description="Bytes of tensors per file; without it the shards are those of the base",
    ),
]
StartQuery = Annotated[
    Start, Query(description="`nf4` adds the change to what 4-bit numbers leave of linear layers (QLoRA)")
]


def merge_options(
    dtype: DtypeQuery = "base",
    scale: ScaleQuery = 1.0,
    shard_size: ShardSizeQuery = None,
    start: StartQuery = "original",
) -> MergeOptions:
    """Absent ones have the defaults of a stored merge."""
    return MergeOptions(dtype=dtype, scale=scale, shard_size=shard_size, start=start)


MergeOptionsDep = Annotated[MergeOptions, Depends(merge_options)]
