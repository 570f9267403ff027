"""Documents of different lengths in one row without padding, each attending to itself only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from lora_core.attention import DocumentsFunction, fits
from lora_core.data import IGNORED, Example

# Families whose packed loss is shown by a test to be the sum of single losses.
PACKED_FAMILIES = frozenset(
    {
        *(
            "gemma",
            "gemma3_text",
            "gpt2",
            "gpt_neox",
            "granite",
            "llama",
            "mistral",
            "mixtral",
            "olmo2",
            "opt",
            "phi",
            "phi3",
        ),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
    }
)
_NAME = "lora_core_documents"


@dataclass(frozen=True)
class Packed:
    """Rows end to end: ids, labels and each token's position in its own row, (1, N) int64; `lengths` sum to N.

    The first label of each row is IGNORED: what precedes it is another row.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    lengths: list[int]


def pack(examples: Sequence[Example], device: torch.device) -> Packed:
    """The examples in one row, in their order."""
    lengths = [len(example.input_ids) for example in examples]
    input_ids = torch.cat([torch.from_numpy(example.input_ids) for example in examples]).long()
    labels = torch.cat([torch.from_numpy(example.labels) for example in examples]).long()
    labels[[0, *accumulate(lengths[:-1])]] = IGNORED
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Packed(input_ids[None].to(device), labels[None].to(device), positions[None].to(device), lengths)


def can_pack(model: Any) -> bool:
    """Whether rows of this model can share a row: the others are padded to the longest of a batch."""
    config = model.config
    attends = getattr(config, "_attn_implementation", None) in {"sdpa", _NAME}
    return attends and config.model_type in PACKED_FAMILIES


@contextmanager
def documents_apart(model: Any) -> Iterator[None]:
    """Within, `model` takes packed rows, and only those. It must last until after the backward pass."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def packed_hidden(model: Any, packed: Packed) -> Tensor:
    """Last hidden states, (1, N, d), within `documents_apart`."""
    found = model.get_decoder()(
        input_ids=packed.input_ids, position_ids=packed.positions, document_lengths=packed.lengths, use_cache=False
    )
    return found.last_hidden_state


def attend(
    module: Any,  # noqa: ARG001  the interface gives it
    query: Tensor,  # (1, heads, N, head)
    key: Tensor,  # (1, key heads, N, head)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, (1, N, heads, head): no mask, and nothing is computed across documents."""
    if attention_mask is not None or softcap is not None:
        raise ValueError("a packed row attends without a mask and without a cap")
    if not dropout and not _reaches(sliding_window, document_lengths) and fits(query, document_lengths):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return DocumentsFunction.apply(query, key, value, document_lengths, scale), None
    parts = [
        F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(length, sliding_window, query.device),
            is_causal=not sliding_window or length <= sliding_window,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        ).transpose(1, 2)
        for length, q, k, v in zip(
            document_lengths,
            query.split(document_lengths, 2),
            key.split(document_lengths, 2),
            value.split(document_lengths, 2),
            strict=True,
        )
    ]
    return torch.cat(parts, 1), None


def _reaches(window: int | None, lengths: Sequence[int]) -> bool:
    """Whether some token does not see all before it."""
    return bool(window) and max(lengths) > (window or 0)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Where a token sees only the last `window` ones, itself included: who sees whom, (T, T)."""
    if not window or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(_NAME, attend)
