"""Cross-entropy of a causal model at labelled positions only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.architectures import ARCHITECTURES
from lora_core.data import IGNORED, Example

_CHUNK_TOKENS = 2048


def collate(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and labels, (B, T) int64, padded on the right with 0 and IGNORED."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
        labels[row, : len(example.labels)] = torch.from_numpy(example.labels)
    return input_ids.to(device), labels.to(device)


def loss_sum(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Σ −log p(label | tokens before it) over all labels but IGNORED, float32, differentiable.

    The output layer, often the largest of all, runs at labelled positions only. No attention mask: attention is
    causal and padding is on the right, so no real token sees it.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, d)
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    hidden = hidden[:, :-1][wanted]  # (N, d)
    divisor = ARCHITECTURES[model.config.model_type].logits_divisor
    scale = 1 / getattr(model.config, divisor) if divisor else 1.0
    # In pieces, so that (N, vocabulary) logits in float32 never exist at once in evaluation.
    parts = [
        F.cross_entropy(model.lm_head(piece).float() * scale, target, reduction="sum")
        for piece, target in zip(hidden.split(_CHUNK_TOKENS), targets[wanted].split(_CHUNK_TOKENS), strict=True)
    ]
    return torch.stack(parts).sum()
