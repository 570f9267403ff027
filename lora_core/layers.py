"""`LoraLinear`: a frozen linear layer plus scaling · lora_B · lora_A (arXiv:2106.09685, section 4.1)."""

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core.layer import LoraLayer


class LoraFunction(torch.autograd.Function):
    """y = x·Wᵀ + bias + scaling · (x∘keep)·Aᵀ·Bᵀ, with W and bias frozen.

    Saves one x, shared with every other layer that reads it, and the rank-r product; adds in place. `keep` is the
    dropout mask, already divided by 1 − p, or None. Factors are used in the dtype of x.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        x: Tensor,  # (…, in)
        weight: Tensor,  # (out, in)
        bias: Tensor | None,  # (out)
        lora_A: Tensor,  # (r, in)
        lora_B: Tensor,  # (out, r)
        scaling: float,
        keep: Tensor | None,  # like x
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = F.linear(rows, weight, bias)
        h = _dropped(rows, keep) @ A.T  # (N, r)
        y.addmm_(h, B.T, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, h, keep)
        ctx.scaling = scaling
        # Not a view: autograd would refuse a model that adds to it in place, as Falcon does.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, h, keep = ctx.saved_tensors
        want_x, _, _, want_A, want_B, _, _ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = None
        if want_B:
            dB = (h.T @ dy).mul_(ctx.scaling).T.to(lora_B.dtype)  # (out, r); the other way round takes twice as long
        if want_x or want_A:
            dh = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scaling)  # (N, r)
        if want_A:
            dA = (dh.T @ _dropped(rows, keep)).to(lora_A.dtype)  # (r, in)
        if want_x:
            dx = dy @ weight
            A = lora_A.to(dy.dtype)
            if keep is None:
                dx.addmm_(dh, A)
            else:
                dx.addcmul_(dh @ A, keep.reshape(rows.shape))
            dx = dx.view(x.shape)
        return dx, None, None, dA, dB, None, None


class LoraLinear(LoraLayer):
    """y = base(x) + scaling · x·Aᵀ·Bᵀ with `lora_A` (r, in) and `lora_B` (out, r), which starts at zero."""

    TENSORS = MappingProxyType({"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", **LoraLayer.TENSORS})

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        path: str,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        gaussian: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_layer, path=path, r=r, scaling=scaling, lora_dropout=lora_dropout, seed=seed)
        out_features, in_features = self.matrix().shape
        self.lora_A = self.start((r, in_features), in_features, gaussian=gaussian)
        self.lora_B = self.zeros(out_features, r)

    def matrix(self) -> Tensor:
        """The base's weight as (out, in)."""
        return self.base_layer.weight

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) as they are used; variants make them of what they train."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        keep = None
        if self.training and self.lora_dropout:
            keep = F.dropout(torch.ones_like(x), self.lora_dropout)
        bias = self.bias_to_add()
        frozen = base.bias if bias is None else None  # a trained bias gets its gradient outside of the function
        lora_A, lora_B = self.factors()
        y = LoraFunction.apply(x, self.matrix(), frozen, lora_A, lora_B, self.scaling, keep)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · lora_B · lora_A, (out, in), float32."""
        lora_A, lora_B = self.factors()
        return self.scaling * (lora_B @ lora_A)


class LoraConv1D(LoraLinear):
    """The same over transformers' Conv1D, a linear layer that stores (in, out); the factors are as for a Linear."""

    def matrix(self) -> Tensor:
        return self.base_layer.weight.T

    def delta_weight(self) -> Tensor:
        """(scaling · lora_B · lora_A)ᵀ, (in, out), float32."""
        return super().delta_weight().T


def _dropped(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep.reshape(rows.shape)
