"""How much memory a training step will take, before any of it is taken.

The step is run on tensors without numbers: every allocation is counted, nothing is allocated. Families, variants and
options need no formula of their own, and what the loop does differently next year is counted as it is then.
"""

import resource
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lora_core.config import LoraConfig
from lora_core.inject import inject
from lora_core.mode import training
from lora_core.output_loss import token_losses
from lora_core.packing import Packed, can_pack, packed_hidden
from lora_core.qlora import quantise_base, resident_bytes, room_for
from lora_core.train_config import TrainConfig
from lora_core.trainable import trained_parameters


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the highest point of a step, by what they are for; `runtime` is what the process has already."""

    base: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def step(self) -> int:
        """What a step adds to a process that has the model loaded."""
        return self.optimizer + self.gradients + self.activations + self.logits


def plan_memory(
    base: Path,
    lora: LoraConfig,
    config: TrainConfig,
    lengths: Sequence[int],
    *,
    labelled: float,
    dtype: torch.dtype,
    quantised: bool = False,
) -> MemoryPlan:
    """For the largest micro-batch: rows of `lengths` tokens, of which the share `labelled` is learnt.

    A row of a step that fits `config.tokens_per_batch` alone is the least that can be in memory at once. `quantised`:
    on a base in 4 bits, which for a moment of its loading is there whole.
    """
    runtime = _resident()
    with FakeTensorMode(allow_non_fake_inputs=True):
        settings = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
        if quantised:
            quantise_base(model, pack=room_for)
        weights = resident_bytes(model)
        inject(model, lora, seed=0)
        trained = list(trained_parameters(model).values())
        count = _Count()
        with training(model, config, packed=can_pack(model)), count:
            hidden = _hidden(model, lengths, packing=config.packing)
            kept = count.now
            wanted = max(1, round(labelled * sum(lengths)))
            rows = hidden.reshape(-1, hidden.shape[-1])[:wanted] * 1.0
            loss = token_losses(rows, model.get_output_embeddings(), torch.zeros(wanted, dtype=torch.int64)).sum()
            peak_of_loss = count.peak
            loss.backward()
    factors = _bytes(trained)
    return MemoryPlan(
        base=weights,
        adapter=factors,
        optimizer=2 * factors,
        gradients=factors,
        # The gradients are among what the backward pass allocates.
        activations=max(kept, count.peak - factors - (peak_of_loss - kept)),
        logits=peak_of_loss - kept,
        runtime=runtime,
    )


def _hidden(model: Any, lengths: Sequence[int], *, packing: bool) -> Tensor:
    if not can_pack(model):
        rows = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        hidden: Tensor = model.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        return hidden
    if packing:
        row = torch.zeros(1, sum(lengths), dtype=torch.int64)
        return packed_hidden(model, Packed(row, row, row, list(lengths)))
    # Padded rows attend without a mask, too, but transformers makes one for tensors that it cannot look into.
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    return packed_hidden(model, Packed(rows, rows, rows, [max(lengths)]))


class _Count(TorchDispatchMode):
    """Bytes of all storages that were made within and are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident() -> int:
    """Bytes of this process in main memory; 0 where nobody can say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # macOS
        return 0
