"""One forward pass in which each row of the batch has its own adapter."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.addition import adds_product
from lora_core.errors import BadConfig, ShapeMismatch
from lora_core.layer import AdapterLayer
from lora_core.layers import LoraLinear

# Up to this sum of ranks, all adapters' products for all rows are cheaper than a pass for each adapter.
_MOST_COLUMNS = 512


def mixed_layers(
    names: Sequence[str | None], adapters: Mapping[str, Mapping[str, AdapterLayer]]
) -> dict[str, nn.Module]:
    """Path → the layer for batches of len(names) rows, for every path that one of `adapters` adapts."""
    mixed: dict[str, nn.Module] = {}
    for path in sorted(set().union(*adapters.values())):
        present = {name: layers[path] for name, layers in adapters.items() if path in layers}
        base = next(iter(present.values())).base_layer
        plain = {name: layer for name, layer in present.items() if _is_plain(layer)}
        if len(plain) == len(present) and sum(layer.r for layer in plain.values()) <= _MOST_COLUMNS:
            stacked = StackedLinear(base, path, names, plain)
            if torch.isfinite(stacked.B).all():  # else it would reach other rows: 0 · ∞ is NaN
                mixed[path] = stacked
                continue
        mixed[path] = SplitLayer(base, path, names, present)
    return mixed


class StackedLinear(nn.Module):
    """y = base(x) + ((x·Aᵀ) ∘ mask)·Bᵀ with the lora_A of all adapters below each other in A (R, in), their scaled
    lora_B beside each other in B (out, R), and for each row the columns of its own adapter in the mask."""

    def __init__(
        self, base: nn.Module, path: str, names: Sequence[str | None], layers: Mapping[str, LoraLinear]
    ) -> None:
        super().__init__()
        self.base_layer, self.path = base, path
        dtype: torch.dtype = layers[next(iter(layers))].matrix().dtype
        pairs = {name: layer.factors() for name, layer in layers.items()}
        self.A = torch.cat([A.to(dtype) for A, _ in pairs.values()])
        self.B = torch.cat([(layers[name].scaling * B).to(dtype) for name, (_, B) in pairs.items()], dim=1)
        owners = [name for name, (A, _) in pairs.items() for _ in range(len(A))]
        self.others = torch.tensor([[owner != name for owner in owners] for name in names], device=self.A.device)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (rows, …, in) → (rows, …, out)."""
        _check_rows(x, len(self.others), self.path)
        y = self.base_layer(x)
        h = F.linear(x, self.A)  # (rows, …, R)
        # Not a product with zero: another adapter's infinity stays its own.
        h.masked_fill_(self.others.view(len(x), *(1,) * (x.dim() - 2), -1), 0.0)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.B.T)
        return y

    def __getattr__(self, name: str) -> Any:
        """What else the rest of the model asks is the base's."""
        return _of_base(self, name)


class SplitLayer(nn.Module):
    """Any kind of layer: the rows of one adapter at a time."""

    def __init__(
        self, base: nn.Module, path: str, names: Sequence[str | None], layers: Mapping[str, AdapterLayer]
    ) -> None:
        super().__init__()
        self.base_layer, self.path, self.count = base, path, len(names)
        users = {name if name in layers else None for name in names}
        self.parts = [
            (
                base if user is None else layers[user],
                torch.tensor([row for row, name in enumerate(names) if (name if name in layers else None) == user]),
            )
            for user in sorted(users, key=str)
        ]

    @torch.no_grad()
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (rows, …) → what each row's own layer makes of it. BadConfig for a layer that wants more than x."""
        if args or kwargs:
            raise BadConfig(f"{self.path} computes with more than one input; its adapters cannot be mixed in a batch")
        _check_rows(x, self.count, self.path)
        y: Tensor | None = None
        for layer, rows in self.parts:
            part = layer(x[rows])
            if y is None:
                y = part.new_empty(self.count, *part.shape[1:])
            y[rows] = part
        return y if y is not None else self.base_layer(x)

    def __getattr__(self, name: str) -> Any:
        """What else the rest of the model asks is the base's."""
        return _of_base(self, name)


def _is_plain(layer: AdapterLayer) -> TypeGuard[LoraLinear]:
    return adds_product(layer) and layer.bias_to_add() is None


def _check_rows(x: Tensor, rows: int, path: str) -> None:
    if x.dim() < 2 or len(x) != rows:
        raise ShapeMismatch(
            f"{path} got an input of shape {list(x.shape)}, and adapters were named for {rows} rows; "
            "the first dimension must be those rows (beams are rows too)"
        )


def _of_base(module: nn.Module, name: str) -> Any:
    try:
        return nn.Module.__getattr__(module, name)
    except AttributeError:
        if name == "base_layer":
            raise
        return getattr(nn.Module.__getattr__(module, "base_layer"), name)
