"""A frozen base in 4 bits (QLoRA, arXiv:2305.14314): NF4 with double quantisation, laid out as bitsandbytes does.

The formula is that of `nf4`, which merges into what a QLoRA training saw. A weight stays packed between its uses.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lora_core import nf4
from lora_core.errors import BadConfig
from lora_core.keymap import OUTPUT_LAYERS

_PIECE = 2**14  # blocks unpacked at once: what lies between packed and dense stays in the cache
# By byte its two numbers, the first in the upper half, as one 8-byte item: looking them up takes one step.
_PAIRS = torch.from_numpy(nf4.LEVELS[[[byte >> 4, byte & 15] for byte in range(256)]]).view(torch.int64).flatten()
_MAXIMA = torch.from_numpy(nf4.EIGHT_BITS)
# Trained whole, or so few numbers for so much said that 4 bits cost more than they save.
_WHOLE = (*OUTPUT_LAYERS, "score", "classifier")
_aten = torch.ops.aten


@dataclass(frozen=True)
class Packed:
    """n numbers: `levels` (n/2) uint8, `maxima` (n/64) uint8, `largest` (n/64/256) and `offset` () float32."""

    levels: Tensor
    maxima: Tensor
    largest: Tensor
    offset: Tensor

    @property
    def resident_bytes(self) -> int:
        """What it takes of memory."""
        return sum(part.nbytes for part in (self.levels, self.maxima, self.largest, self.offset))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The same with each of its tensors changed."""
        return Packed(change(self.levels), change(self.maxima), change(self.largest), change(self.offset))

    def block_maxima(self) -> Tensor:
        """float32 absolute maximum of each block of 64."""
        maxima = _MAXIMA.to(self.maxima.device).index_select(0, self.maxima.int())
        return maxima.mul_(self.largest.repeat_interleave(nf4.BLOCK_OF_MAXIMA)[: len(maxima)]).add_(self.offset)

    def unpack(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense tensor, each number rounded once to `dtype`."""
        maxima = self.block_maxima()
        if self.levels.is_cuda and (kernel := _kernel()):
            return kernel(self.levels, maxima, nf4.BLOCK, "nf4", shape, dtype)
        dense = torch.empty(len(maxima), nf4.BLOCK, dtype=dtype, device=maxima.device)
        pairs = _PAIRS.to(maxima.device)
        for first in range(0, len(maxima), _PIECE):
            largest = maxima[first : first + _PIECE, None]
            codes = self.levels[first * nf4.BLOCK // 2 : (first + _PIECE) * nf4.BLOCK // 2]
            values = pairs.index_select(0, codes.int()).view(torch.float32).view(len(largest), nf4.BLOCK)
            dense[first : first + _PIECE] = values.mul_(largest)
        return dense.view(shape)


def pack(dense: Tensor) -> Packed:
    """4-bit numbers for `dense` (…, n), 64 divides n. Exact in what bitsandbytes computes on a CPU."""
    values = dense.detach().to("cpu", torch.float32).numpy()
    maxima = nf4.block_maxima(values)
    levels = nf4.codes(values.reshape(-1, nf4.BLOCK), maxima, nf4.LEVELS).reshape(-1, 2)
    indices, largest, offset = nf4.maxima_codes(maxima)
    packed = Packed(*map(torch.from_numpy, (levels[:, 0] << 4 | levels[:, 1], indices, largest, offset)))
    return packed.map(lambda part: part.to(dense.device))


def room_for(dense: Tensor) -> Packed:
    """What `pack` would make, without its numbers: for plans of memory."""
    blocks = dense.numel() // nf4.BLOCK
    levels, maxima = (torch.empty(count, dtype=torch.uint8) for count in (dense.numel() // 2, blocks))
    return Packed(levels, maxima, torch.empty(-(-blocks // nf4.BLOCK_OF_MAXIMA)), torch.empty(()))


class NF4Weight(Tensor):
    """A frozen tensor that is kept in 4 bits and computes as the dense one of its shape and dtype.

    Whatever operation meets it gets the dense numbers, made for that moment; F.linear does so in its backward pass
    once more rather than keep them. Changing it in place is a TypeError; casting it gives a dense tensor.
    """

    packed: Packed

    @staticmethod
    def __new__(cls: type, packed: Packed, shape: torch.Size, dtype: torch.dtype) -> "NF4Weight":
        weight: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.levels.device)
        weight.packed = packed
        return weight

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor."""
        return self.packed.unpack(self.shape, self.dtype).to(dtype or self.dtype)

    def with_parts(self, change: Callable[[Tensor], Tensor]) -> "NF4Weight":
        """The same numbers in other memory."""
        return NF4Weight(self.packed.map(change), self.shape, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's stub returns Any
        return f"NF4Weight({list(self.shape)}, {self.dtype}, {self.packed.resident_bytes} bytes)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], NF4Weight) and not kwargs:
            return _Linear.apply(args[0], args[1], args[2] if len(args) > 2 else None)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's stub leaves it untyped
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0].with_parts(lambda part: part)
        if func is _aten.clone.default:
            return args[0].with_parts(torch.clone)
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0].with_parts(lambda part: part.to(kwargs.get("device"), copy=True))
        if func._schema.is_mutable and isinstance(args[0], NF4Weight):
            raise TypeError(f"{func} would change a weight that is frozen in 4 bits")
        args, kwargs = tree_map_only(NF4Weight, NF4Weight.unpack, (args, kwargs))
        return func(*args, **kwargs)


class _Linear(torch.autograd.Function):
    """x·Wᵀ + bias; keeps nothing but the packed W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.unpack(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        want_x, _, want_bias = ctx.needs_input_grad
        dx = grad @ ctx.weight.unpack(grad.dtype) if want_x else None
        return dx, None, grad.flatten(0, -2).sum(0) if want_bias else None


def quantise_base(
    model: nn.Module, *, skip: Collection[str] = _WHOLE, pack: Callable[[Tensor], Packed] = pack
) -> list[str]:
    """Keep the weight of every linear layer of a base in 4 bits; returns their paths, sorted.

    Modules whose last name is in `skip` stay whole, by default output layers and heads; so do Conv1D and parameters of
    experts, as in a merge. BadConfig if 64 does not divide the inputs of a layer, or there is none; nothing is changed
    then. Inject adapters afterwards.
    """
    layers = {
        path: module
        for path, module in sorted(model.named_modules())
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in skip
    }
    if not layers:
        raise BadConfig("the model has no linear layers to keep in 4 bits")
    for path, layer in layers.items():
        if layer.in_features % nf4.BLOCK:
            raise BadConfig(f"{path} has {layer.in_features} inputs; 4-bit numbers come in blocks of {nf4.BLOCK}")
    for layer in layers.values():
        if not isinstance(layer.weight, NF4Weight):
            packed = NF4Weight(pack(layer.weight), layer.weight.shape, layer.weight.dtype)
            layer.weight = nn.Parameter(packed, requires_grad=False)
    return list(layers)


def resident_bytes(model: nn.Module) -> int:
    """What the model's parameters take of memory, those in 4 bits as they are kept."""
    return sum(p.packed.resident_bytes if isinstance(p, NF4Weight) else p.nbytes for p in model.parameters())


def _kernel() -> Callable[..., Tensor] | None:
    try:
        import bitsandbytes  # noqa: F401  registers the operator
    except ImportError:
        return None
    return torch.ops.bitsandbytes.dequantize_4bit.default
