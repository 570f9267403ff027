"""AdamW over what is trained, in groups by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_core.train_config import TrainConfig


def make_optimizer(named: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """One group, or with LoRA+ a second one of every lora_B; `lr_factor` of a group multiplies the rate of a step."""
    ratio = config.loraplus_lr_ratio
    faster = [name for name in named if ratio is not None and name.endswith("lora_B")]
    groups: list[dict[str, Any]] = [
        {"params": [named[name] for name in named if name not in faster], "lr_factor": 1.0},
        {"params": [named[name] for name in faster], "lr_factor": ratio},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, before the groups' factors."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
