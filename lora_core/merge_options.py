"""What a merge can be asked for, with its bounds. Standard library only: the command line reads it on every start."""

from typing import Literal

MAX_SCALE = 100.0
MIN_SHARD_SIZE, MAX_SHARD_SIZE = 2**16, 2**40
# "original": the base as it is stored; "nf4": what 4-bit numbers leave of its linear layers, which QLoRA trains on.
Start = Literal["original", "nf4"]
