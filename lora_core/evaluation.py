"""The loss of a model on rows that it does not learn from."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lora_core import distributed
from lora_core.batching import micro_batches
from lora_core.mode import evaluating
from lora_core.task import Task, default_task, packs


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Any], *, task: Task | None = None, tokens_per_batch: int = 4096) -> float:
    """Mean loss per target. The model's mode is kept. In a process group each process evaluates its share."""
    task = task or default_task(model)
    lengths = [task.length(example) for example in examples]
    rows = range(len(examples))
    cut = partial(micro_batches, lengths=lengths, max_tokens=tokens_per_batch, packed=packs(task))
    loss = 0.0
    with evaluating(model, packed=packs(task)):
        for piece in cut(distributed.share(rows, lengths)):
            batch = task.collate([examples[row] for row in piece], model.device)
            loss += distributed.loss_sum(task, model, batch).item()
        for row in distributed.idle_rows(model, rows, lengths, cut):
            distributed.loss_sum(task, model, task.collate([examples[row]], model.device))
    return distributed.total(loss, model.device) / sum(task.targets(example) for example in examples)
