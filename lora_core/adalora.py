"""AdaLoRA (arXiv:2303.10512): ΔW as P·Λ·Q, and ranks taken from the modules that need them least while it trains."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adalora_config import AdaLoraConfig
from lora_core.config import LoraConfig
from lora_core.layer import LoraLayer
from lora_core.layers import LoraConv1D, LoraLinear

_FACTORS = ("lora_A", "lora_B", "lora_E")


class AdaLoraLinear(LoraLinear):
    """y = base(x) + scaling · x·(lora_B · diag(lora_E) · lora_A)ᵀ, lora_E (r, 1) starting at zero.

    `kept` (r) says which triplets the budget has left; the others' lora_E is zero whenever the allocator was there.
    """

    TENSORS = MappingProxyType({**{name: name for name in _FACTORS}, **LoraLayer.TENSORS})
    kept: Tensor

    def __init__(self, base_layer: nn.Module, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        generator = self._generator()
        for factor in (self.lora_A, self.lora_B):
            with torch.no_grad():
                factor.copy_(torch.empty(factor.shape).normal_(0.0, 0.02, generator=generator))
        self.lora_E = self.zeros(self.r, 1)
        device = self.base_layer.weight.device
        self.register_buffer("kept", torch.ones(self.r, dtype=torch.bool, device=device), persistent=False)
        shapes = {name: getattr(self, name).shape for name in _FACTORS}
        self.importance = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.uncertainty = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    @classmethod
    def options(cls, config: LoraConfig) -> dict[str, Any]:  # noqa: ARG003  it has no say
        """Nothing: there is one way to start."""
        return {}

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(lora_E) · lora_A (r, in) and lora_B (out, r)."""
        return self.lora_A * self.lora_E, self.lora_B

    def saved(self) -> Tensor:
        """(r) which triplets an adapter file has: those kept, and any that grew back since the last allocation."""
        return self.kept | (self.lora_E.detach()[:, 0] != 0)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The factors, without the triplets that are pruned."""
        tensors = super().adapter_tensors()
        if not self.lora_E.is_meta and not (saved := self.saved()).all():
            tensors |= {"lora_A": self.lora_A[saved], "lora_B": self.lora_B[:, saved], "lora_E": self.lora_E[saved]}
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As every layer does. Of a module that was pruned to nothing, nothing is left to train."""
        super().load_tensors(tensors)
        if not self.r:
            self.requires_grad_(requires_grad=False)

    def training_state(self) -> dict[str, Tensor]:
        """What the allocator goes on with."""
        found = {"kept": self.kept.view(torch.uint8)}
        for name in _FACTORS:
            found[f"importance.{name}"] = self.importance[name]
            found[f"uncertainty.{name}"] = self.uncertainty[name]
        return found

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the sensitivity |w · ∇w| of every weight into the running averages, while gradients are there."""
        for name in _FACTORS:
            factor, importance, uncertainty = getattr(self, name), self.importance[name], self.uncertainty[name]
            sensitivity = (factor * factor.grad).abs()
            importance.mul_(beta1).add_((1 - beta1) * sensitivity)
            uncertainty.mul_(beta2).add_((1 - beta2) * (sensitivity - importance).abs())

    def scores(self) -> Tensor:
        """(r) importance of each triplet: that of its singular value, and the means of its two vectors."""
        weights = {name: self.importance[name] * self.uncertainty[name] for name in _FACTORS}
        return weights["lora_E"][:, 0] + (weights["lora_A"].mean(1) + weights["lora_B"].mean(0))

    @torch.no_grad()
    def prune(self) -> None:
        """Zero the singular values of the triplets that are not kept."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    def orthogonality(self) -> Iterator[Tensor]:
        """‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖."""
        for product in (self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B):
            yield (product - torch.eye(len(product), device=product.device)).norm()


class AdaLoraConv1D(AdaLoraLinear, LoraConv1D):
    """The same over transformers' Conv1D, which stores (in, out)."""


def with_ranks(config: AdaLoraConfig, layers: Mapping[str, LoraLayer]) -> AdaLoraConfig:
    """The configuration with what is left of each module."""
    saved = {path: iter(layer.saved().tolist()) for path, layer in layers.items() if isinstance(layer, AdaLoraLinear)}
    every = (True,) * config.init_r  # a layer that was loaded has only those triplets that were left
    kept = {
        path: tuple(was and next(mask) for was in config.kept.get(path, every)) for path, mask in sorted(saved.items())
    }
    return replace(config, kept={} if all(map(all, kept.values())) else kept)
