"""Data-parallel training: every process has the whole model and a share of each step's rows.

Only the trained tensors' gradients travel, as one buffer per step; the frozen base never does. A program that is
started once per process (`torchrun`) and has called `torch.distributed.init_process_group` trains so without a word.
"""

from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn


def world_size() -> int:
    """How many processes train together; 1 where nobody has made a group of them."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is. The first one tells and saves."""
    return dist.get_rank() if world_size() > 1 else 0


def share(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """This process's rows of a step: dealt out from the longest to the shortest, so that all have about as much."""
    return sorted(rows, key=lambda row: -lengths[row])[rank() :: world_size()]


def total(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return float(found)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every process's gradients become the sum over all; a process without rows adds zeros."""
    if world_size() == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)
