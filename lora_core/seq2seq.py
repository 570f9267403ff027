"""Models that read a source and write a target, such as T5."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.data import IGNORED, Dataset
from lora_core.errors import DatasetError, NothingToLearn
from lora_core.floats import Array
from lora_core.rows import Row, kind_of

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pair:
    """Token ids of a source, (S,), and a target, (T,), int32; both end with end-of-sequence."""

    source: Array
    target: Array


def tokenize_pairs(tokenizer: Any, rows: Iterable[Row], max_length: int) -> Dataset[Pair]:
    """Rows `{"prompt", "completion"}` as source and target, each of at most `max_length` tokens and the end mark."""
    examples = []
    truncated = 0
    for row in rows:
        if kind_of(row) != "prompt":
            raise DatasetError("a model that reads and writes needs rows of prompt and completion")
        source, target = (_encode(tokenizer, row[name]) for name in ("prompt", "completion"))
        truncated += max(len(source), len(target)) > max_length
        examples.append(Pair(_ended(tokenizer, source[:max_length]), _ended(tokenizer, target[:max_length])))
    if not examples:
        raise NothingToLearn("there is no row")
    return Dataset(examples, truncated, 0)


class Seq2Seq:
    """Cross-entropy of each token of the target, given the source and the target before it."""

    def length(self, example: Pair) -> int:
        return len(example.source) + len(example.target)

    def targets(self, example: Pair) -> int:
        return len(example.target)

    def collate(self, examples: Sequence[Pair], device: torch.device) -> Batch:
        """Source ids and their mask, (B, S), and labels, (B, T) padded with IGNORED; all int64."""
        source = _padded([example.source for example in examples], 0)
        mask = _padded([np.ones_like(example.source) for example in examples], 0)
        labels = _padded([example.target for example in examples], IGNORED)
        return source.to(device), mask.to(device), labels.to(device)

    def loss_sum(self, model: Any, batch: Batch) -> Tensor:
        source, mask, labels = batch
        start = model.config.decoder_start_token_id
        before = F.pad(labels[:, :-1].clamp(min=0), (1, 0), value=start)  # what the decoder has read at each place
        output = model(input_ids=source, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits
        return F.cross_entropy(output.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ended(tokenizer: Any, ids: list[int]) -> Array:
    return np.array([*ids, tokenizer.eos_token_id], np.int32)


def _padded(rows: Sequence[Array], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded
