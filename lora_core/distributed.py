"""Data-parallel training: every process has the trained tensors and a share of each step's rows.

The trained tensors' gradients travel, as one buffer per step; the frozen base does only where `sharding` cut it into
pieces. A program that is started once per process (`torchrun`) and has called
`torch.distributed.init_process_group` trains so without a word.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_core.errors import BadConfig
from lora_core.task import Task

# The method of a model with a sharded base that makes it whole for a task.
LOSS_SUM: Final = "sharded_loss_sum"

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together; 1 where nobody has made a group of them."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is. The first one tells and saves."""
    return dist.get_rank() if world_size() > 1 else 0


def share(rows: Iterable[int], lengths: Sequence[int], of: int | None = None) -> list[int]:
    """This process's rows of a step, or those of another: dealt out from the longest to the shortest, so that all
    have about as much."""
    return sorted(rows, key=lambda row: -lengths[row])[rank() if of is None else of :: world_size()]


def is_sharded(model: nn.Module) -> bool:
    """Whether `sharding` cut its base into pieces."""
    return hasattr(model, LOSS_SUM)


def loss_sum(task: Task, model: Any, batch: Any) -> Tensor:
    """What `task` makes of it; all processes compute at the same time where the base is sharded."""
    if not is_sharded(model):
        return task.loss_sum(model, batch)
    loss: Tensor = getattr(model, LOSS_SUM)(task, batch)
    if not torch.is_grad_enabled():  # there will be no backward pass after which what is left would go
        model.reshard()
    return loss


def idle_rows(
    model: nn.Module, rows: Sequence[int], lengths: Sequence[int], cut: Callable[[list[int]], Sequence[object]]
) -> list[int]:
    """Rows that this process computes once more, for nothing: where the base is sharded, every process takes part in
    each pass of any other. `cut` makes the pieces of a share; it is the same in all processes."""
    if not is_sharded(model):
        return []
    passes = [len(cut(share(rows, lengths, of))) for of in range(world_size())]
    return [min(rows, key=lambda row: lengths[row])] * (max(passes) - passes[rank()])


def total(value: float, device: torch.device) -> float:
    """The sum over all processes."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return float(found)


def gathered(value: T) -> list[T]:
    """What each process has, in their order. It travels as a pickle: for processes that trust each other."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def require_equal(value: object, what: str) -> None:
    """BadConfig unless it is the same in all processes: else their sums mean nothing, or they wait forever."""
    if len(set(gathered(hashlib.sha256(repr(value).encode()).hexdigest()))) > 1:
        raise BadConfig(f"the processes were given different {what}")


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in every process."""
    if world_size() == 1:
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every process's gradients become the sum over all; a process without rows adds zeros."""
    if world_size() == 1:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype, copy=True)
