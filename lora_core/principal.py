"""Training that starts from the base's own principal directions: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.layer import start_generator
from lora_core.layers import LoraConv1D, LoraLinear

_SMALL = 512  # rows of a matrix that is decomposed whole
_BLOCKS = 10  # at which the start keeps 99.5 % of the energy of even a matrix of noise, 4096 wide
_OVERSAMPLES = 8


class PrincipalLinear(LoraLinear):
    """y = base(x) + scaling · x·(B·A − B₀·A₀)ᵀ, where A₀ and B₀, at which A and B start, are found in W.

    That is LoRA on the residual W − scaling·B₀·A₀, without changing W: ejected, the base is what it was. To the world
    the layer is a plain LoRA of rank 2r, [A; A − A₀] and [B − B₀, B₀], which fits the unchanged base.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, base_layer: nn.Module, *, method: str = "pissa", **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        most = min(self.matrix().shape)
        if self.r > most:
            raise BadConfig(f"{self.path} has {most} principal directions; r is {self.r}")
        self.method = method
        start_B, start_A = _STARTS[method](self.matrix().detach().float(), self.r, self.scaling, self.path)
        self.register_buffer("start_A", start_A.contiguous(), persistent=False)
        self.register_buffer("start_B", start_B.contiguous(), persistent=False)
        self.lora_A = nn.Parameter(self.start_A.clone())
        self.lora_B = nn.Parameter(self.start_B.clone())

    @classmethod
    def options(cls, config: LoraConfig) -> dict[str, Any]:
        """Where the factors start. BadConfig now, rather than at the end, if twice the rank is too much."""
        as_plain(config)
        return {"method": config.init_lora_weights}

    def settings(self) -> tuple[Any, ...]:
        return *super().settings(), self.method

    def factors(self) -> tuple[Tensor, Tensor]:
        """(2r, in) and (out, 2r): what is added to the base.

        [A; A₀] and [B, −B₀] are the same product. But rounded to half precision, as they are used there, A and A₀ would
        be equal until they differ by their eighth bit; their difference, taken in float32, is not lost.
        """
        lora_A = torch.cat([self.lora_A, self.lora_A - self.start_A])
        return lora_A, torch.cat([self.lora_B - self.start_B, self.start_B], 1)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """A plain LoRA of twice the rank."""
        lora_A, lora_B = self.factors()
        return super().adapter_tensors() | {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: ARG002  none can be taken
        """Refused: what was saved is a plain LoRA, and `load_adapter` makes plain layers for it."""
        raise BadConfig(f"{self.path} is in training from principal directions; load the adapter into a fresh base")

    def has_learned(self) -> bool:
        """Whether the factors are other than at the start."""
        return not (torch.equal(self.lora_A, self.start_A) and torch.equal(self.lora_B, self.start_B))

    def training_state(self) -> dict[str, Tensor]:
        """The start, so that a run goes on from the same one whatever the linear algebra gives next time."""
        return {"start_A": self.start_A, "start_B": self.start_B}


class PrincipalConv1D(PrincipalLinear, LoraConv1D):
    """The same over transformers' Conv1D, which stores (in, out)."""


def as_plain(config: LoraConfig) -> LoraConfig:
    """The configuration of what such layers save: twice the rank, the same scaling, an ordinary start."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={path: 2 * r for path, r in config.rank_pattern.items()},
        alpha_pattern={path: factor * alpha for path, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def _pissa(weight: Tensor, r: int, scaling: float, path: str) -> tuple[Tensor, Tensor]:
    """The r largest singular directions, each factor with the root of the singular value.

    By the eigenvectors of the smaller product of the weight with itself: many times faster than all of the SVD, and in
    float64 as exact for the largest directions. Of a large weight only within a subspace that holds them.
    """
    if weight.shape[0] > weight.shape[1]:
        U, Vh = _pissa(weight.T, r, scaling, path)
        return Vh.T, U.T
    basis = _subspace(weight, r, path)
    W = weight.double() if basis is None else (basis.T @ weight).double()
    values, vectors = torch.linalg.eigh(W @ W.T)  # ascending
    U = vectors[:, -r:].flip(1)
    S = values[-r:].flip(0).clamp(min=0).sqrt()
    roots = (S / scaling).sqrt()
    Vh = (U.T @ W) / S.clamp(min=torch.finfo(S.dtype).tiny)[:, None]
    if basis is not None:
        U = basis.double() @ U
    return (U * roots).to(weight.dtype), (roots[:, None] * Vh).to(weight.dtype)


def _subspace(weight: Tensor, r: int, path: str) -> Tensor | None:
    """Orthonormal columns (out, k) that span nearly all of the r largest left singular directions of a weight that is
    not higher than wide; None where there is not much to save.

    A block Krylov space (arXiv:1504.05477): unlike plain power iterations it keeps what every one of them found, which
    tells directions apart whose singular values hardly differ. It starts at random numbers that `path` alone decides.
    """
    width = r + _OVERSAMPLES
    if len(weight) <= _SMALL or 2 * _BLOCKS * width >= len(weight):
        return None
    sample = torch.randn(weight.shape[1], width, generator=start_generator(0, path)).to(weight)
    basis = block = torch.linalg.qr(weight @ sample)[0]
    for _ in range(_BLOCKS - 1):
        block = weight @ (weight.T @ block)
        block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = torch.cat([basis, block], 1)
    # Where nothing new was left but rounding, a block is not as orthogonal to those before as it should be.
    return torch.linalg.qr(basis)[0]


def _olora(weight: Tensor, r: int, scaling: float, path: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001  one signature
    """The first r columns of Q and rows of R, for which the first r columns of the weight are enough."""
    Q = torch.linalg.qr(weight[:, :r])[0]
    return Q, Q.T @ weight


_STARTS = {"pissa": _pissa, "olora": _olora}
