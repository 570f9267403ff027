"""Weights plus what adapters add to them, for a model in memory."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lora_core.errors import NonFinite
from lora_core.layer import LoraLayer
from lora_core.layers import LoraConv1D, LoraLinear

_BLOCK = 2**19  # numbers of a weight that are computed at once: in float32 they stay in the cache


def add_deltas(sums: Iterable[tuple[LoraLayer, Tensor]]) -> None:
    """For each (layer, out): the base's weight plus `delta_weight`, in float32 and rounded once, into `out`, which has
    the weight's shape and dtype. What is too large for float16 is NonFinite.

    On a CPU each thread takes whole layers: threads that wait for each other at every block were ten times slower on
    a machine with other work to do.
    """
    scratch = threading.local()

    def prepare() -> None:
        torch.set_num_threads(1)  # of this thread

    def add(layer: LoraLayer, out: Tensor) -> None:
        with torch.no_grad():
            if adds_product(layer):
                if not hasattr(scratch, "values"):
                    scratch.values = torch.empty(2 * _BLOCK)
                _add_product(layer, out, scratch.values)
            else:
                out.copy_(layer.base_layer.weight.float() + layer.delta_weight())
            if out.dtype == torch.float16 and not torch.isfinite(out).all():
                raise NonFinite(f"the merged weight of {layer.path} is too large for float16")

    sums = list(sums)
    if any(out.device.type != "cpu" for _, out in sums):
        for layer, out in sums:
            add(layer, out)
        return
    with ThreadPoolExecutor(torch.get_num_threads(), "merge", prepare) as pool:
        for done in [pool.submit(add, layer, out) for layer, out in sums]:
            done.result()


def adds_product(layer: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether what the layer does to the weight is no more than to add its product; variants do more."""
    return isinstance(layer, LoraLinear) and type(layer).forward is LoraLinear.forward


def _add_product(layer: LoraLinear, out: Tensor, scratch: Tensor) -> None:
    """Block by block of rows, in the same memory again and again: fresh memory would cost more than the arithmetic."""
    weight: Tensor = layer.base_layer.weight
    right, left = layer.factors()
    if isinstance(layer, LoraConv1D):
        left, right = right.T, left.T
    step = max(_BLOCK // weight.shape[1], 1)
    if weight.shape[1] > len(scratch) or weight.device != scratch.device:
        scratch = torch.empty(step * weight.shape[1], device=weight.device)
    for begin in range(0, len(weight), step):
        rows = weight[begin : begin + step]
        values = scratch[: rows.numel()].view(rows.shape)
        values.copy_(rows).addmm_(left[begin : begin + step], right, alpha=layer.scaling)
        out[begin : begin + step] = values
