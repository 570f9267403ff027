"""Cross-entropy of a causal model at labelled positions only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.architectures import ARCHITECTURES
from lora_core.data import IGNORED, Example
from lora_core.output_loss import token_losses
from lora_core.packing import Packed, packed_hidden


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
    return _losses(model, _hidden(model, input_ids), labels).sum()


def row_losses(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The same sum for each row, (B,) float32."""
    losses = _losses(model, _hidden(model, input_ids), labels)  # (N,)
    rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]  # (N,)
    return torch.zeros(len(labels), device=losses.device).index_add(0, rows, losses)


def packed_loss_sum(model: Any, packed: Packed) -> Tensor:
    """`loss_sum` of rows that share a row, within `documents_apart`."""
    return _losses(model, packed_hidden(model, packed), packed.labels).sum()


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    """(B, T, d). No attention mask: attention is causal and padding is on the right, so no real token sees it."""
    return model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state


def _losses(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """−log p of each label but IGNORED, (N,)."""
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    divisor = ARCHITECTURES[model.config.model_type].logits_divisor
    scale = 1 / getattr(model.config, divisor) if divisor else 1.0
    return token_losses(hidden[:, :-1][wanted], model.get_output_embeddings(), targets[wanted], scale=scale)
