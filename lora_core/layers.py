"""`LoraLinear`: a frozen linear layer plus scaling · lora_B · lora_A (arXiv:2106.09685, section 4.1)."""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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


class LoraLinear(nn.Module):
    """Wraps `base_layer` and freezes it; `lora_A` (r, in) and `lora_B` (out, r) are float32 and trained.

    `path` is the module's name in the model: with `seed` it alone decides the start of lora_A, whatever else the
    model holds. lora_A starts Kaiming-uniform (a = √5), or normal with deviation 1/r; lora_B starts at zero.
    """

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
        super().__init__()
        self.base_layer = base_layer.requires_grad_(requires_grad=False)
        self.scaling = scaling
        self.lora_dropout = lora_dropout
        out_features, in_features = base_layer.weight.shape
        device = base_layer.weight.device
        generator = torch.Generator().manual_seed(_module_seed(seed, path))
        lora_A = torch.empty(r, in_features, dtype=torch.float32)
        if gaussian:
            lora_A.normal_(0.0, 1 / r, generator=generator)
        else:
            bound = 1 / math.sqrt(in_features)  # what kaiming_uniform_ with a = √5 comes to
            lora_A.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        base = self.base_layer
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


def _module_seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "little") >> 1
