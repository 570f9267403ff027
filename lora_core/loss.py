"""Cross-entropy of a causal model at labelled positions only."""

from collections.abc import Iterator, Sequence
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

    The output layer, often the largest of all, runs at labelled positions only.
    """
    return torch.cat(list(_losses(model, *_labelled(model, input_ids, labels)))).sum()


def row_losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The same sum for each row, (B,) float32."""
    losses = torch.cat(list(_losses(model, *_labelled(model, input_ids, labels))))  # (N,)
    rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]  # (N,)
    return torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)


def _labelled(model: Any, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the output layer predicts from at labelled positions, (N, d), and what it should predict, (N,).

    No attention mask: attention is causal and padding is on the right, so no real token sees it.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, d)
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    return hidden[:, :-1][wanted], targets[wanted]


def _losses(model: Any, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """−log p of each target, in pieces: (N, vocabulary) logits in float32 never exist at once in evaluation."""
    divisor = ARCHITECTURES[model.config.model_type].logits_divisor
    scale = 1 / getattr(model.config, divisor) if divisor else 1.0
    for piece, target in zip(hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True):
        yield F.cross_entropy(model.lm_head(piece).float() * scale, target, reduction="none")
