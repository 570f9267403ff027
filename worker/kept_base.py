"""The frozen base that a training process keeps for its next task, and the proof that it is what was loaded."""

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.inject import eject
from lora_core.qlora import NF4Weight
from worker.protocol import ReadyMessage
from worker.reporter import Reporter

Load = Callable[[], tuple[Any, Any]]
Seal = dict[str, tuple[Any, ...]]


class KeptBase:
    """At most one base at a time: model, tokenizer, and the seal taken when it was loaded."""

    def __init__(self) -> None:
        self._key: object = None
        self._base: tuple[Any, Any] | None = None
        self._seal: Seal = {}

    def get(self, key: object, load: Load) -> tuple[Any, Any]:
        """The base that `key` names: the kept one, or what `load` answers."""
        if self._base is None or key != self._key:
            self.drop()
            self._base = load()
            self._key = key
            self._seal = take_seal(self._base[0])
        return self._base

    def drop(self) -> None:
        self._base = None
        gc.collect()

    def offer(self, reporter: Reporter) -> bool:
        """Take the adapter out, prove that nothing else changed, and tell that another task may come. Whether it may:
        not after a request to stop, nor if the base differs."""
        if self._base is None:
            return False
        model = self._base[0]
        eject(model)
        gc.collect()  # optimizer and activations: what is resident now is what waiting costs
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if take_seal(model) != self._seal or reporter.is_stopped():
            return False
        reporter.write(ReadyMessage(resident_bytes=resident_bytes()))
        return True


def take_seal(model: Any) -> Seal:
    """All of a model that a training could have changed: every tensor by address, version, form and sum of its bits,
    every module by kind, mode and hooks, and the config."""
    seal: Seal = {"config": (repr(model.config.to_dict()),)}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        switches = (module.training, "forward" in vars(module), getattr(module, "gradient_checkpointing", None))
        seal[f"module {name}"] = (type(module), *switches, *map(len, hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        form = (tensor.shape, tensor.dtype, tensor.requires_grad)
        seal[f"tensor {name}"] = (*form, *(mark for part in parts_of(tensor) for mark in take_marks(part)))
    return seal


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold its numbers: itself, or what a weight in 4 bits is packed into."""
    if not isinstance(tensor, NF4Weight):
        return [tensor.detach()]
    packed = tensor.packed
    return [packed.levels, packed.maxima, packed.largest, packed.offset]


def take_marks(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype, bit_sum(tensor)


def bit_sum(tensor: Tensor) -> int:
    """The bits of a tensor as integers of 64, added modulo 2⁶⁴: one pass at the speed of memory, which takes none.

    A sum over narrower integers would first make 64 bits of each: four times a bfloat16 tensor, at once."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % 8
    rest = bytes(flat[whole:].tolist())
    return (int(flat[:whole].view(torch.int64).sum()) + int.from_bytes(rest, "little")) % 2**64


def resident_bytes() -> int:
    """Memory that this process holds: of the machine and, if it computes there, of the device."""
    device = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() + device
    except OSError:  # macOS, whose getrusage knows the peak only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + device
