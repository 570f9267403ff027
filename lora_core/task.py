"""What a training run learns: how its examples become batches, and what is lost on a batch."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core.data import Example
from lora_core.loss import collate, loss_sum


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
    """Predict each labelled token from those before it."""

    def length(self, example: Example) -> int:
        return len(example.input_ids)

    def targets(self, example: Example) -> int:
        return example.targets

    def collate(self, examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
        return collate(examples, device)

    def loss_sum(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_sum(model, *batch)


CAUSAL_LM = CausalLM()
