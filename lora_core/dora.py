"""DoRA (arXiv:2402.09353): the rows of W + scaling · B · A keep their direction and get a trained length."""

from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_core.convolutions import LoraConv
from lora_core.embeddings import LoraEmbedding
from lora_core.errors import BadConfig
from lora_core.layer import LoraLayer
from lora_core.layers import LoraConv1D, LoraLinear

_ROWS = 1024  # of a weight in half precision, at once in float32
_MAGNITUDE = {"lora_magnitude_vector": "lora_magnitude_vector"}


class DoraFunction(torch.autograd.Function):
    """y = (x − x∘keep)·Wᵀ + (magnitude/norm) ∘ v, where v = (x∘keep)·(W + scaling·B·A)ᵀ; without `keep`, x∘keep is x.

    W and norm, the lengths of the rows of W + scaling·B·A, are constants (section 4.3 of the paper). Saves x, v and
    the rank-r product. Factors are used in the dtype of x, lengths in float32.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any,
        x: Tensor,  # (…, in)
        weight: Tensor,  # (out, in)
        lora_A: Tensor,  # (r, in)
        lora_B: Tensor,  # (out, r)
        magnitude: Tensor,  # (out)
        norm: Tensor,  # (out)
        scaling: float,
        keep: Tensor | None,  # like x
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dropped = _dropped(rows, keep)
        h = dropped @ lora_A.to(x.dtype).T  # (N, r)
        v = F.linear(dropped, weight)
        v.addmm_(h, lora_B.to(x.dtype).T, alpha=scaling)
        y = torch.mul(v, magnitude / norm, out=torch.empty_like(v))
        if keep is not None:
            y += F.linear(rows - dropped, weight)
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, norm, h, v, keep)
        ctx.scaling = scaling
        # Not a view: autograd would refuse a model that adds to it in place.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, magnitude, norm, h, v, keep = ctx.saved_tensors
        want_x, _, want_A, want_B, want_magnitude, *_ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = dm = None
        dv = torch.mul(dy, magnitude / norm, out=torch.empty_like(dy))
        if want_magnitude:
            dm = (dy.to(norm.dtype) * v.to(norm.dtype)).sum(0) / norm
        if want_B:
            dB = (dv.T @ h).mul_(ctx.scaling).to(lora_B.dtype)
        if want_x or want_A:
            dh = (dv @ lora_B.to(dy.dtype)).mul_(ctx.scaling)  # (N, r)
        if want_A:
            dA = (dh.T @ _dropped(rows, keep)).to(lora_A.dtype)
        if want_x:
            A = lora_A.to(dy.dtype)
            if keep is None:
                dx = (dv @ weight).addmm_(dh, A)
            else:
                dx = (dy @ weight).addcmul_((dv.sub_(dy) @ weight).addmm_(dh, A), keep.reshape(rows.shape))
            dx = dx.view(x.shape)
        return dx, None, dA, dB, dm, None, None, None


class Lengths(LoraLayer):
    """What every kind of DoRA layer has besides its LoRA: `lora_magnitude_vector`, which starts as the lengths of W.

    `rows()` is W as (out, in), `factors()` are A (r, in) and B (out, r).
    """

    base_squares: Tensor

    def measure(self, *shape: int) -> None:
        """Find the lengths of W; the trained ones get `shape`. A row of zeros is BadConfig: it has no direction."""
        squares = torch.cat([rows.double().square().sum(1) for rows in self.rows().split(_ROWS)])
        # a plan of memory has shapes and no numbers
        if not isinstance(squares, FakeTensor) and not squares.all():
            row = int((squares == 0).nonzero()[0])
            raise BadConfig(f"row {row} of {self.path} is all zero: it has no direction, so DoRA cannot adapt it")
        self.register_buffer("base_squares", squares.float(), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt().float().reshape(shape))
        self._norm: tuple[Any, Tensor] | None = None

    def rows(self) -> Tensor:
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Lengths of the rows of W + scaling·B·A, (out) float32, found without that matrix.

        Outside of training they are kept until a factor changes: a text of many tokens finds them once.
        """
        A, B = self.factors()
        if self.training:
            return self._find_norm(A, B)
        key = (A.data_ptr(), A._version, B.data_ptr(), B._version, self.scaling)
        if self._norm is None or self._norm[0] != key:
            self._norm = key, self._find_norm(A, B)
        return self._norm[1]

    def _find_norm(self, A: Tensor, B: Tensor) -> Tensor:
        crossed = torch.cat([rows.float() @ A.T for rows in self.rows().split(_ROWS)])  # W·Aᵀ (out, r)
        change = 2 * crossed + self.scaling * (B @ (A @ A.T))
        return ((change * B).sum(1) * self.scaling + self.base_squares).sqrt()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002  torch's signature
        """Optimizers that keep all factors in one buffer change them unseen: what was kept is forgotten."""
        self._norm = None
        return super().train(mode)

    def has_learned(self) -> bool:
        """Whether the product or the lengths are other than at the start."""
        lengths = self.lora_magnitude_vector.flatten()
        return super().has_learned() or not torch.allclose(lengths, self.base_squares.sqrt(), atol=0, rtol=1e-6)

    def scale(self) -> Tensor:
        """By what the rows of W + scaling·B·A are multiplied, (out) float32; their present lengths are constants."""
        return self.lora_magnitude_vector.flatten() / self.norm()

    @torch.no_grad()
    def change(self) -> Tensor:
        """What is added to `rows()`, float32."""
        A, B = self.factors()
        rows = self.rows().float()
        return (rows + self.scaling * (B @ A)) * self.scale()[:, None] - rows


class DoraLinear(Lengths, LoraLinear):
    """x·Vᵀ + bias, V = W + scaling·B·A with its rows scaled to the lengths `lora_magnitude_vector` (out).

    While training, dropout acts on x wherever V does more than W.
    """

    TENSORS = MappingProxyType({**LoraLinear.TENSORS, **_MAGNITUDE})

    def __init__(self, base_layer: nn.Module, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        self.measure(-1)

    def rows(self) -> Tensor:
        """W (out, in)."""
        return self.matrix()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return LoraLinear.factors(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        if not self.enabled:
            return self.base_layer(x)
        keep = F.dropout(torch.ones_like(x), self.lora_dropout) if self.training and self.lora_dropout else None
        magnitude, norm = self.lora_magnitude_vector, self.norm()
        y = DoraFunction.apply(x, self.matrix(), *self.factors(), magnitude, norm, self.scaling, keep)
        bias = self.bias_to_add()
        bias = self.base_layer.bias if bias is None else bias
        return y if bias is None else y + bias.to(y.dtype)

    def delta_weight(self) -> Tensor:
        """V − W, (out, in), float32."""
        return self.change()


class DoraConv1D(DoraLinear, LoraConv1D):
    """The same over transformers' Conv1D, which stores (in, out); `lora_magnitude_vector` is (out) as well."""

    def delta_weight(self) -> Tensor:
        """(V − W)ᵀ, (in, out), float32."""
        return self.change().T


class DoraEmbedding(Lengths, LoraEmbedding):
    """The rows x of V, whose columns W + scaling·(B·A)ᵀ are scaled to the lengths `lora_magnitude_vector` (dim)."""

    TENSORS = MappingProxyType({**LoraEmbedding.TENSORS, **_MAGNITUDE})

    def __init__(self, base_layer: nn.Embedding, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        self.measure(-1)

    def rows(self) -> Tensor:
        """Wᵀ (dim, tokens)."""
        return self.base_layer.weight.T

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, tokens) and B (dim, r)."""
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, x: Tensor) -> Tensor:
        """Token ids x (…) → (…, dim)."""
        y = super().forward(x)
        return (y * self.scale()).to(y.dtype) if self.enabled else y

    def delta_weight(self) -> Tensor:
        """V − W, (tokens, dim), float32."""
        return self.change().T


class DoraConv(Lengths, LoraConv):
    """A convolution with V; `lora_magnitude_vector` (1, out, 1, …) are the lengths of V's filters."""

    TENSORS = MappingProxyType({**LoraConv.TENSORS, **_MAGNITUDE})

    def __init__(self, base_layer: nn.Module, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        self.measure(*self.per_channel())

    def rows(self) -> Tensor:
        """W (out, in · kernel)."""
        return self.base_layer.weight.flatten(1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in · kernel) and B (out, r)."""
        return self.lora_A.flatten(1), self.lora_B.flatten(1)

    def per_channel(self) -> tuple[int, ...]:
        """The shape of one number per channel of the output."""
        return 1, -1, *(1 for _ in self.base_layer.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in, *space) → (batch, out, *space)."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        dropped = F.dropout(x, self.lora_dropout, training=self.training)
        v = self.convolve(dropped, base.weight) + self.added(dropped)
        y = (v * self.scale().reshape(self.per_channel())).to(x.dtype)
        if dropped is not x:
            y = y + self.convolve(x - dropped, base.weight)
        bias = self.bias_to_add()
        bias = base.bias if bias is None else bias
        return y if bias is None else y + bias.to(y.dtype).reshape(self.per_channel())

    def delta_weight(self) -> Tensor:
        """V − W, (out, in, *kernel), float32."""
        return self.change().reshape(self.base_layer.weight.shape)


def _dropped(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep.reshape(rows.shape)
