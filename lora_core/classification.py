"""Sequence classification and regression: one answer per row, by an encoder or a language model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.data import Dataset
from lora_core.errors import BadConfig, DatasetError
from lora_core.floats import Array

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Labelled:
    """Token ids, (T,) int32, and the class, or the number to be told."""

    input_ids: Array
    label: float


def tokenize_labelled(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int) -> Dataset[Labelled]:
    """Rows `{"text", "label"}`, with `text_pair` for two sentences, as examples of at most `max_length` tokens.

    The longer of two sentences loses its end first. DatasetError names the row that is none.
    """
    examples = []
    truncated = 0
    for number, row in enumerate(rows, start=1):
        texts, label = [row.get("text"), row.get("text_pair", "")], row.get("label")
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise DatasetError(f"row {number} needs a text, and a text_pair only if it is one")
        if isinstance(label, bool) or not isinstance(label, int | float) or not np.isfinite(label):
            raise DatasetError(f"row {number} needs a label that is a number")
        pair = [texts[1]] if "text_pair" in row else []
        full = len(tokenizer(texts[0], *pair)["input_ids"])
        ids = tokenizer(texts[0], *pair, truncation=True, max_length=max_length)["input_ids"]
        truncated += len(ids) < full
        examples.append(Labelled(np.array(ids, np.int32), label))
    if not examples:
        raise DatasetError("there is no row")
    return Dataset(examples, truncated, 0)


class Classification:
    """Cross-entropy of `num_labels` classes, numbered from 0; squared error if `num_labels` is 1."""

    def __init__(self, num_labels: int, *, pad_token_id: int) -> None:
        if num_labels < 1:
            raise BadConfig(f"num_labels must be at least 1, not {num_labels}")
        self.num_labels = num_labels
        self.pad_token_id = pad_token_id

    def length(self, example: Labelled) -> int:
        return len(example.input_ids)

    def targets(self, example: Labelled) -> int:  # noqa: ARG002  every row counts the same
        return 1

    def collate(self, examples: Sequence[Labelled], device: torch.device) -> Batch:
        """input_ids and attention mask, (B, T) int64, padded on the right, and labels, (B,)."""
        width = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros(len(examples), width, dtype=torch.int64)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
            mask[row, : len(example.input_ids)] = 1
        return input_ids.to(device), mask.to(device), self._labels(examples).to(device)

    def loss_sum(self, model: Any, batch: Batch) -> Tensor:
        input_ids, mask, labels = batch
        output = model(input_ids=input_ids, attention_mask=mask).logits.float()  # (B, num_labels)
        if self.num_labels == 1:
            return F.mse_loss(output[:, 0], labels, reduction="sum")
        return F.cross_entropy(output, labels, reduction="sum")

    def _labels(self, examples: Sequence[Labelled]) -> Tensor:
        labels = [example.label for example in examples]
        if self.num_labels == 1:
            return torch.tensor(labels, dtype=torch.float32)
        if wrong := [label for label in labels if label not in range(self.num_labels)]:
            raise DatasetError(f"{wrong[0]} is no class; classes are the integers from 0 to {self.num_labels - 1}")
        return torch.tensor(labels, dtype=torch.int64)
