"""What a training run is told: every number that decides what it learns and how it fits into memory."""

import math
from dataclasses import dataclass
from typing import Any

from lora_core.errors import BadConfig
from lora_core.schedule import Schedule

_COUNTS = ("n_epochs", "batch_size", "tokens_per_batch", "max_steps", "eval_steps", "early_stopping_patience")
_OPTIONAL = ("max_steps", "eval_steps", "early_stopping_patience")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`batch_size` rows make one optimizer step; `tokens_per_batch` bounds what is in memory at once.

    `loraplus_lr_ratio`: the rate of every lora_B over that of the rest (LoRA+, arXiv:2402.12354).
    `eval_steps`: steps between evaluations besides those at the end of each epoch.
    `early_stopping_patience`: so many evaluations without a new best loss end the run.
    `packing`: rows share a row, each attending to itself only, where the model's family can; nothing is padded then.
    `activation_checkpointing`: keep only each block's input and compute the block again in the backward pass.
    """

    n_epochs: int = 1
    batch_size: int = 8
    max_steps: int | None = None
    learning_rate: float = 2e-4
    loraplus_lr_ratio: float | None = None
    lr_scheduler_type: Schedule = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0 turns clipping off
    seed: int = 0
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    tokens_per_batch: int = 4096
    packing: bool = True
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value: Any = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and value < 1:
                raise BadConfig(f"{name} must be at least 1")
        if not 0 < self.learning_rate <= 1:
            raise BadConfig("learning_rate must be above 0 and at most 1")
        if self.loraplus_lr_ratio is not None and not 1 <= self.loraplus_lr_ratio <= 1000:
            raise BadConfig("loraplus_lr_ratio must be from 1 to 1000")
        if self.lr_scheduler_type not in {"linear", "cosine", "constant"}:
            raise BadConfig('lr_scheduler_type must be "linear", "cosine" or "constant"')
        if not 0 <= self.warmup_ratio <= 1 or not 0 <= self.weight_decay <= 1:
            raise BadConfig("warmup_ratio and weight_decay must be from 0 to 1")
        if not 0 <= self.max_grad_norm < math.inf:
            raise BadConfig("max_grad_norm must be 0 (off) or above")
