"""Which modules of a model are trained through `fused`, and how they are put back.

Only modules whose whole formula is known: by the names of transformers' classes, and only where nothing but a plain
adapter is in them. Outside of a training pass with gradients they compute what they always do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.fused import GatedFunction, LinearsFunction, Part, RMSNormFunction
from lora_core.layers import LoraLinear

# Their formula: down_proj of the product of act_fn(gate_proj(x)) and up_proj(x).
_GATED = frozenset(
    {
        *("GemmaMLP", "Gemma3MLP", "GraniteMLP", "LlamaMLP", "MistralMLP", "Olmo2MLP", "Qwen2MLP", "Qwen2MoeMLP"),
        *("Qwen3MLP", "Qwen3MoeMLP", "SmolLM3MLP"),
    }
)
# Their formula: weight times x over the root of mean x² + variance_epsilon, that in float32 and rounded to x's dtype.
_NORMS = frozenset(
    {
        *("GraniteRMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm"),
        *("Qwen2MoeRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "SmolLM3RMSNorm"),
    }
)
# Layers of one parent that are called with the same tensor; if they are not, each computes its own.
_SIBLINGS = ("q_proj", "k_proj", "v_proj")


@contextmanager
def fused_modules(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Within, known modules of `model` train through one node each.

    After a forward pass that failed, what it gives drops the outputs that nobody came for.
    """
    patched: list[Any] = []
    groups: list[_Siblings] = []
    for module in list(model.modules()):
        for target, forward in _replacements(module, groups):
            target.forward = forward
            patched.append(target)

    def forget() -> None:
        for group in groups:
            group.forget()

    try:
        yield forget
    finally:
        for target in patched:
            del target.forward


def _replacements(module: nn.Module, groups: list["_Siblings"]) -> Iterator[tuple[Any, Callable[[Tensor], Tensor]]]:
    name = type(module).__name__ if type(module).__module__.startswith("transformers.models.") else ""
    if name in _GATED:
        yield module, _Gated(module)
    elif name in _NORMS:
        yield module, _Norm(module)
    siblings = [child for child in (getattr(module, name, None) for name in _SIBLINGS) if type(child) is LoraLinear]
    if name and len(siblings) > 1:
        group = _Siblings(siblings)
        groups.append(group)
        for index, layer in enumerate(siblings):
            yield layer, group.member(index)


class _Norm:
    def __init__(self, module: Any) -> None:
        self._module, self._plain = module, module.forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module = self._module
        if not torch.is_grad_enabled() or module.weight.requires_grad:
            return self._plain(hidden_states)
        return RMSNormFunction.apply(hidden_states, module.weight, module.variance_epsilon)


class _Gated:
    def __init__(self, module: Any) -> None:
        self._module, self._plain = module, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        layers = (module.gate_proj, module.up_proj, module.down_proj)
        if not torch.is_grad_enabled() or not all(map(_is_plain, layers)):
            return self._plain(x)
        return GatedFunction.apply(x, [_part(layer) for layer in layers], module.act_fn, *_factors(layers))


class _Siblings:
    """The first one called computes for all; the others find their output, as long as they are given the same x."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self._layers = layers
        self._plain = [layer.forward for layer in layers]
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def forget(self) -> None:
        self._x, self._outputs = None, {}

    def member(self, index: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self._call(index, x)

    def _call(self, index: int, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not all(map(_is_plain, self._layers)):
            return self._plain[index](x)
        if x is not self._x or index not in self._outputs:
            # Nothing is held meanwhile: if memory runs out here, the next try needs what x came from.
            self.forget()
            parts = [_part(layer) for layer in self._layers]
            self._outputs = dict(enumerate(LinearsFunction.apply(x, parts, *_factors(self._layers))))
            self._x = x
        found = self._outputs.pop(index)
        if not self._outputs:
            self._x = None
        return found


def _is_plain(layer: Any) -> bool:
    """A frozen linear layer, or one with two factors and nothing else."""
    if type(layer) is LoraLinear:
        silent = not (layer.training and layer.lora_dropout)
        base = layer.base_layer
        return silent and layer.enabled and layer.bias_to_add() is None and _is_plain(base)
    return type(layer) is nn.Linear and not any(value.requires_grad for value in layer.parameters())


def _part(layer: Any) -> Part:
    if isinstance(layer, LoraLinear):
        return Part(layer.base_layer.weight, layer.base_layer.bias, layer.scaling)
    return Part(layer.weight, layer.bias, 0.0)


def _factors(layers: Any) -> list[Tensor | None]:
    """A, B of each, None where there are none."""
    found: list[Tensor | None] = []
    for layer in layers:
        found += layer.factors() if isinstance(layer, LoraLinear) else (None, None)
    return found
