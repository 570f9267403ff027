"""What a training run learns: how its examples become batches, and what is lost on a batch."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core.data import Example
from lora_core.loss import collate, loss_sum, packed_loss_sum
from lora_core.packing import Packed, can_pack, pack


class Task(Protocol):
    """The loop averages: it divides the sums of a step by the targets of the step, however it is cut into batches."""

    def length(self, example: Any) -> int:
        """Tokens that the example takes in a batch, padding aside."""

    def targets(self, example: Any) -> int:
        """By how much the example counts: labelled tokens, or 1 where a row has one answer."""

    def collate(self, examples: Sequence[Any], device: torch.device) -> Any:
        """A batch on `device`; only `loss_sum` looks into it."""

    def loss_sum(self, model: Any, batch: Any) -> Tensor:
        """The loss summed over the targets of the batch: a scalar, float32, differentiable."""


class CausalLM:
    """Predict each labelled token from those before it. With `packing`, rows share a row instead of being padded."""

    def __init__(self, *, packing: bool = False) -> None:
        self.packing = packing

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def targets(self, example: Example) -> int:
        return example.targets

    def collate(self, examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor] | Packed:
        return pack(examples, device) if self.packing else collate(examples, device)

    def loss_sum(self, model: Any, batch: tuple[Tensor, Tensor] | Packed) -> Tensor:
        return packed_loss_sum(model, batch) if isinstance(batch, Packed) else loss_sum(model, *batch)


def default_task(model: Any, *, packing: bool = True) -> CausalLM:
    """What is trained where nothing else is asked for."""
    return CausalLM(packing=packing and can_pack(model))


def packs(task: Task) -> bool:
    """Whether the batches of `task` have no padding."""
    return getattr(task, "packing", False) is True
