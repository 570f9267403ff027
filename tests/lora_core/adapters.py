"""Adapters made by PEFT, the other implementation of the format, for comparison."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import randomize_adapter

TOKENS = torch.arange(3, 40)[None]


def make_peft_adapter(base: Path, directory: Path, *, scale: float = 0.05, **settings: Any) -> Path:
    """An adapter with random factors, saved by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(directory)
    return randomize_adapter(directory, scale=scale)


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers says, with PEFT's own loading of the adapter on top."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()
