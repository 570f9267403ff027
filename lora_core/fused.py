"""Training passes over several layers as one node of the autograd graph: fewer activations kept, inputs read once.

Same formulas as the modules they stand for, in another order of sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Part:
    """One frozen linear layer, W (out, in), and how much of its rank-r product is added; r = 0 without an adapter."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


class LinearsFunction(torch.autograd.Function):
    """x → the outputs of linear layers that all read x; factors are A, B of each adapted part in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[Part], *factors: Tensor | None) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        outputs, products = linears(rows, parts, factors)
        ctx.save_for_backward(x, products, *factors)
        ctx.parts = parts
        return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, products, *factors = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        flat = [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        want_x, _, *wanted = ctx.needs_input_grad
        dx, found = linears_backward(rows, flat, products, ctx.parts, factors, wanted, want_x=want_x)
        return (dx.view(x.shape) if dx is not None else None, None, *found)


class GatedFunction(torch.autograd.Function):
    """x → down(act(gate(x)) · up(x)), every layer adapted or not; keeps the outputs of gate and up only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Part], act: Callable[[Tensor], Tensor], *factors: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        (gate, up), products = linears(rows, parts[:2], factors[:4])
        (y,), down_products = linears(act(gate).mul_(up), parts[2:], factors[4:])
        ctx.save_for_backward(x, gate, up, products, down_products, *factors)
        ctx.parts, ctx.act = parts, act
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, products, down_products, *factors = ctx.saved_tensors
        want_x, _, _, *wanted = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.act(leaf)
        inner = active.detach() * up
        dinner: Any  # it is wanted, so it is there
        dinner, found = linears_backward(
            inner, [dy], down_products, ctx.parts[2:], factors[4:], wanted[4:], want_x=True
        )
        dup = torch.mul(dinner, active.detach(), out=inner)
        (dgate,) = torch.autograd.grad(active, leaf, dinner.mul_(up))
        dx, more = linears_backward(rows, [dgate, dup], products, ctx.parts[:2], factors[:4], wanted[:4], want_x=want_x)
        return (dx.view(x.shape) if dx is not None else None, None, None, *more, *found)


class RMSNormFunction(torch.autograd.Function):
    """weight · (x / √(mean x² + eps)) with a frozen weight; the mean is float32, and x itself is what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in {torch.bfloat16, torch.float16} else x
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = x.to(scale.dtype)
        dy = (grad * weight).to(scale.dtype)
        along = torch.linalg.vecdot(dy, wide)[..., None].mul_(scale.pow(3).div_(-x.shape[-1]))
        return dy.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def linears(
    rows: Tensor, parts: Sequence[Part], factors: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor | None]:
    """The outputs (N, out) of each part, and rows · [A₁; A₂; …]ᵀ, (N, Σr), read once for all of them."""
    stacked = _stacked(factors, rows.dtype)
    products = rows @ stacked.T if stacked is not None else None
    outputs, first = [], 0
    for part, lora_B in zip(parts, factors[1::2], strict=True):
        y = F.linear(rows, part.weight, part.bias)
        if lora_B is not None and products is not None:
            y.addmm_(products[:, first : first + lora_B.shape[1]], lora_B.to(y.dtype).T, alpha=part.scaling)
            first += lora_B.shape[1]
        outputs.append(y)
    return outputs, products


def linears_backward(  # noqa: PLR0917  in the order of the formula
    rows: Tensor,
    grads: Sequence[Tensor],
    products: Tensor | None,
    parts: Sequence[Part],
    factors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    *,
    want_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of `linears` with respect to its rows and to each of its factors."""
    found: list[Tensor | None] = [None] * len(factors)
    inner = torch.empty_like(products) if products is not None else None
    dx, first = None, 0
    for index, (part, dy) in enumerate(zip(parts, grads, strict=True)):
        lora_B = factors[2 * index + 1]
        if lora_B is not None and products is not None and inner is not None:
            own = slice(first, first + lora_B.shape[1])
            first = own.stop
            if wanted[2 * index + 1]:
                found[2 * index + 1] = (products[:, own].T @ dy).mul_(part.scaling).T.to(lora_B.dtype)
            inner[:, own] = (dy @ lora_B.to(dy.dtype)).mul_(part.scaling)
        if want_x:
            dx = dy @ part.weight if dx is None else dx.addmm_(dy, part.weight)
    stacked = _stacked(factors, rows.dtype)
    if inner is not None and stacked is not None:
        if any(wanted[::2]):
            ranks = [0 if A is None else len(A) for A in factors[::2]]
            for index, dA in enumerate((inner.T @ rows).split(ranks)):
                lora_A = factors[2 * index]
                found[2 * index] = dA.to(lora_A.dtype) if wanted[2 * index] and lora_A is not None else None
        if dx is not None:
            dx.addmm_(inner, stacked)
    return dx, found


def _stacked(factors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """All A, one under the other, (Σr, in)."""
    present = [lora_A.to(dtype) for lora_A in factors[::2] if lora_A is not None]
    return torch.cat(present) if present else None
