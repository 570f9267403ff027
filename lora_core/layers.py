"""`LoraLinear`: a frozen linear layer plus scaling · lora_B · lora_A (arXiv:2106.09685, section 4.1)."""

from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core.config import LoraConfig
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
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, h, keep = ctx.saved_tensors
        want_x, _, _, want_A, want_B, _, _ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = None
        if want_B:
            dB = (dy.T @ h).mul_(ctx.scaling).to(lora_B.dtype)  # (out, r)
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

    TENSORS = MappingProxyType({"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"})

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        path: str,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        gaussian: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_layer, path=path, r=r, scaling=scaling, lora_dropout=lora_dropout, seed=seed)
        out_features, in_features = base_layer.weight.shape
        self.lora_A = self.start((r, in_features), in_features, gaussian=gaussian)
        self.lora_B = self.zeros(out_features, r)

    @classmethod
    def from_config(cls, base_layer: nn.Linear, path: str, config: LoraConfig, seed: int) -> Self:
        """The layer that `config` asks for in the place `path`."""
        return cls(
            base_layer,
            path=path,
            r=config.rank_for(path),
            scaling=config.scaling_for(path),
            lora_dropout=config.lora_dropout,
            gaussian=config.init_lora_weights == "gaussian",
            seed=seed,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        keep = None
        if self.training and self.lora_dropout:
            keep = F.dropout(torch.ones_like(x), self.lora_dropout)
        return LoraFunction.apply(x, base.weight, base.bias, self.lora_A, self.lora_B, self.scaling, keep)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · lora_B · lora_A, (out, in), float32."""
        return self.scaling * (self.lora_B @ self.lora_A)


def _dropped(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep.reshape(rows.shape)
