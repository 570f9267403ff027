"""Direct preference optimisation (arXiv:2305.18290): the base itself, its adapter off, is the reference."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.data import Dataset, Example, tokenize_row
from lora_core.errors import BadConfig, DatasetError, NothingToLearn
from lora_core.inject import adapter_disabled
from lora_core.loss import collate, row_losses
from lora_core.rows import Row, kind_of


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is better."""

    chosen: Example
    rejected: Example


def tokenize_preferences(tokenizer: Any, rows: Iterable[Row], max_length: int) -> Dataset[Preference]:
    """Every row as a Preference whose answers have at most `max_length` tokens with their prompt.

    Rows of which an answer has no token left are skipped. NothingToLearn if all are; DatasetError for other rows.
    """
    examples: list[Preference] = []
    truncated = skipped = 0
    for row in rows:
        pair = [tokenize_row(tokenizer, answer, max_length + 1) for answer in _answers(row)]
        truncated += any(len(example.input_ids) > max_length for example in pair)
        chosen, rejected = (Example(e.input_ids[:max_length], e.labels[:max_length]) for e in pair)
        if chosen.targets and rejected.targets:
            examples.append(Preference(chosen, rejected))
        else:
            skipped += 1
    if not examples:
        raise NothingToLearn(f"no row has both answers within {max_length} tokens; shorten prompts or raise the limit")
    return Dataset(examples, truncated, skipped)


class DPO:
    """Σ over pairs of −log σ(β · ((log π − log π_ref)(chosen) − (log π − log π_ref)(rejected))).

    `beta` (above 0) holds the model to the reference. The reference costs one forward pass and no memory: it is the
    same base with the adapter turned off.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if not 0 < beta <= 100:
            raise BadConfig(f"beta must be above 0 and at most 100, not {beta!r}")
        self.beta = beta

    def length(self, example: Preference) -> int:
        return 2 * max(len(example.chosen.input_ids), len(example.rejected.input_ids))

    def targets(self, example: Preference) -> int:  # noqa: ARG002  every pair counts the same
        return 1

    def collate(self, examples: Sequence[Preference], device: torch.device) -> tuple[Tensor, Tensor]:
        """input_ids and labels, (2·B, T): all chosen answers, then all rejected ones."""
        return collate([e.chosen for e in examples] + [e.rejected for e in examples], device)

    def loss_sum(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -F.logsigmoid(self.beta * self.margins(model, batch)).sum()

    def margins(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """By how much more than the reference the model prefers each chosen answer, (B,), in nats."""
        training = model.training
        with torch.no_grad(), adapter_disabled(model):
            reference = _preferred_by(model.eval(), batch)  # the base's own dropout would blur it
        return _preferred_by(model.train(training), batch) - reference


def _preferred_by(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """log p(chosen) − log p(rejected), (B,)."""
    chosen, rejected = row_losses(model, *batch).chunk(2)
    return rejected - chosen


def _answers(row: Row) -> tuple[Row, Row]:
    """The row as two rows to imitate."""
    if kind_of(row) != "preference":
        raise DatasetError("preference training (DPO) needs rows that compare two answers")
    if "input" in row:
        asked = row["input"]["messages"]
        return {"messages": asked + row["preferred_output"]}, {"messages": asked + row["non_preferred_output"]}
    return (
        {"prompt": row["prompt"], "completion": row["chosen"]},
        {"prompt": row["prompt"], "completion": row["rejected"]},
    )
