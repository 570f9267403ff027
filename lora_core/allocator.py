"""Who loses rank while AdaLoRA trains (arXiv:2303.10512, section 3.2), as PEFT's RankAllocator decides it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adalora import AdaLoraLinear
from lora_core.adalora_config import AdaLoraConfig
from lora_core.errors import BadConfig
from lora_core.inject import lora_layers
from lora_core.task import Task, packs


class RankAllocator:
    """Leaves the most important triplets of all modules, as many as the budget allows.

    `train(…, task=allocator.task(CausalLM()), after_step=allocator.after_step)`. What it knows lies in the layers and
    in the step's number, so that a run that goes on from a checkpoint goes on allocating.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig) -> None:
        found = lora_layers(model).values()
        self.layers = [layer for layer in found if isinstance(layer, AdaLoraLinear)]
        if not self.layers:
            raise BadConfig("the model has no AdaLoRA layers; inject an AdaLoraConfig first")
        self.config = config
        self.initial = sum(layer.r for layer in self.layers)
        self.target = config.target_r * len(self.layers)

    def task(self, task: Task) -> Task:
        """`task` with the orthogonal regulariser added to its loss in training."""
        return _Regularised(task, self)

    def budget(self, step: int) -> int:
        """Triplets left after `step`: all at first, then falling with the cube of what remains of the schedule."""
        config, end = self.config, self.config.total_step - self.config.tfinal
        if step <= config.tinit:
            return self.initial
        if step > end:
            return self.target
        remaining = 1 - (step - config.tinit) / (end - config.tinit)
        return int((self.initial - self.target) * remaining**3 + self.target)

    def after_step(self, step: int) -> None:
        """To be called between an optimizer step and the zeroing of its gradients."""
        config, end = self.config, self.config.total_step - self.config.tfinal
        if step < end:
            for layer in self.layers:
                layer.observe(config.beta1, config.beta2)
        if step == end or (config.tinit < step < end and step % config.deltaT == 0):
            self._allocate(self.budget(step))
        if step > end:  # what was pruned stays so, but the optimizer does not know
            for layer in self.layers:
                layer.prune()

    def _allocate(self, budget: int) -> None:
        if budget >= self.initial:
            return
        scores = [layer.scores() for layer in self.layers]
        # Ties with the best of those to go, go as well.
        threshold = torch.cat(scores).kthvalue(self.initial - budget).values
        for layer, score in zip(self.layers, scores, strict=True):
            layer.kept.copy_(score > threshold)
            layer.prune()

    def orthogonality(self) -> Tensor:
        """Mean distance of the factors from orthogonal ones."""
        terms = [term for layer in self.layers for term in layer.orthogonality()]
        return torch.stack(terms).mean()


class _Regularised:
    """A task whose loss has orth_reg_weight · orthogonality added once per step, however the step is cut."""

    # so that `vars` are what decides the bits of a run, for its fingerprint
    __slots__ = ("__dict__", "_allocator", "_task")

    def __init__(self, task: Task, allocator: RankAllocator) -> None:
        self._task, self._allocator = task, allocator
        self.packing = packs(task)
        self.inner = type(task).__name__, sorted(vars(task).items())
        self.settings = allocator.config

    def length(self, example: Any) -> int:
        return self._task.length(example)

    def targets(self, example: Any) -> int:
        return self._task.targets(example)

    def collate(self, examples: Sequence[Any], device: torch.device) -> Any:
        return self._task.collate(examples, device), sum(self._task.targets(example) for example in examples)

    def loss_sum(self, model: Any, batch: Any) -> Tensor:
        inner, targets = batch
        loss = self._task.loss_sum(model, inner)
        if not model.training:
            return loss
        # the loop divides by the targets of the step
        return loss + targets * self._allocator.config.orth_reg_weight * self._allocator.orthogonality()
