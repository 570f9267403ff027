"""LoRA of experts: parameters that hold one matrix for each expert of a mixture (PEFT's `target_parameters`)."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.layer import AdapterLayer, start_generator
from lora_core.layers import LoraFunction, LoraLinear
from lora_core.targets import lookup, matches, saving


class LoraExperts(AdapterLayer):
    """A module of experts of which some parameters W (experts, out, in) become W_e + scaling · B_e · A_e.

    As PEFT lays them out: lora_A (experts·r, in) holds expert after expert; in the columns of lora_B (out, experts·r)
    the expert changes fastest. Where the module stores (experts, in, out), the product is transposed. The experts are
    computed one by one, and no matrix but the base's is made.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        path: str,
        ranks: Mapping[str, int],
        scalings: Mapping[str, float],
        gaussian: bool = False,
        seed: int | None = 0,
    ) -> None:
        super().__init__(base_layer, path=path)
        # PEFT wraps the module once for each parameter, in their order, and its names tell the wrappers only.
        names = [name for name, _ in base_layer.named_parameters(recurse=False) if name in ranks]
        wrappers = {name: "base_layer." * (len(names) - 1 - place) for place, name in enumerate(names)}
        self.scalings = {name: scalings[name] for name in names}
        self.in_out = bool(getattr(base_layer, "is_transposed", False))
        # Attributes end like those of other layers: LoRA+ tells lora_B by it.
        self.TENSORS = MappingProxyType(  # type: ignore[misc]  # of each module its own
            {f"{wrappers[name]}lora_{factor}.weight": f"{name}_lora_{factor}" for name in names for factor in "AB"}
        )
        for name in names:
            experts, out_features, in_features = self._shape(name)
            shapes = (experts * ranks[name], in_features), (out_features, experts * ranks[name])
            device = "meta" if seed is None else getattr(base_layer, name).device
            lora_A, lora_B = (nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes)
            if seed is not None:
                _start(lora_A, start_generator(seed, f"{path}.{name}"), 1 / ranks[name] if gaussian else None)
            setattr(self, f"{name}_lora_A", lora_A)
            setattr(self, f"{name}_lora_B", lora_B)

    @classmethod
    def from_config(cls, base_layer: nn.Module, path: str, config: LoraConfig, seed: int | None) -> Self:
        """The layer that `config` asks for in the place `path`."""
        names = targeted(base_layer, path, config.target_parameters)
        return cls(
            base_layer,
            path=path,
            ranks={name: config.rank_for(f"{path}.{name}") for name in names},
            scalings={name: config.scaling_for(f"{path}.{name}") for name in names},
            gaussian=config.init_lora_weights == "gaussian",
            seed=seed,
        )

    def _shape(self, name: str) -> tuple[int, int, int]:
        """(experts, out, in)."""
        experts, rows, columns = getattr(self.base_layer, name).shape
        return (experts, columns, rows) if self.in_out else (experts, rows, columns)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B (experts, out, r) of one parameter."""
        experts, out_features, in_features = self._shape(name)
        lora_A, lora_B = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")
        return lora_A.view(experts, -1, in_features), lora_B.view(out_features, -1, experts).permute(2, 0, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base makes of the arguments with the adapted parameters."""
        base = self.base_layer
        if not self.enabled:
            return base(*args, **kwargs)
        # transformers wraps it in a choice of implementations, of which this one takes the experts one by one
        one_by_one = inspect.unwrap(type(base).forward)
        return one_by_one(_WithAdapted(base, {name: self._adapted(name) for name in self.scalings}), *args, **kwargs)

    def _adapted(self, name: str) -> "_Adapted":
        lora_A, lora_B = self.factors(name)
        # taken apart once: each slice by itself would make a gradient as large as all
        pieces = lora_A.unbind(0), lora_B.unbind(0)
        return _Adapted(getattr(self.base_layer, name), *pieces, self.scalings[name], in_out=self.in_out)

    def settings(self) -> tuple[Any, ...]:
        return tuple(self.scalings.items())

    def rescale(self, factor: float) -> None:
        self.scalings = {name: factor * scaling for name, scaling in self.scalings.items()}

    def has_learned(self) -> bool:
        """Whether neither factor of some parameter is all zero."""
        return any(all(bool(factor.any()) for factor in self.factors(name)) for name in self.scalings)

    @torch.no_grad()
    def delta_weights(self) -> dict[str, Tensor]:
        """Parameter → what is added to it, float32, in its shape and orientation."""
        deltas = {name: self.scalings[name] * (B @ A) for name in self.scalings for A, B in [self.factors(name)]}
        return {name: delta.mT if self.in_out else delta for name, delta in deltas.items()}


@torch.no_grad()
def _start(lora_A: Tensor, generator: torch.Generator, deviation: float | None) -> None:
    """Kaiming-uniform (a = √5), or normal."""
    start, bound = torch.empty(lora_A.shape), 1 / math.sqrt(lora_A.shape[1])
    if deviation is None:
        start.uniform_(-bound, bound, generator=generator)
    else:
        start.normal_(0.0, deviation, generator=generator)
    lora_A.copy_(start)


class _WithAdapted:
    """A module of experts to its own forward, but for some parameters."""

    def __init__(self, base: nn.Module, adapted: Mapping[str, "_Adapted"]) -> None:
        self._base = base
        self.__dict__ |= adapted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class _Adapted:
    """A parameter of which one expert's matrix is taken at a time."""

    def __init__(
        self, weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: float, *, in_out: bool
    ) -> None:
        self._weight, self._lora_A, self._lora_B, self._scaling, self._in_out = weight, lora_A, lora_B, scaling, in_out

    def __getitem__(self, expert: Any) -> "_Matrix":
        place = int(expert)
        factors = self._lora_A[place], self._lora_B[place], self._scaling
        return _Matrix(self._weight[place], *factors, in_out=self._in_out)


class _Matrix:
    """W_e + scaling · B_e · A_e, by which rows can be multiplied: F.linear(x, it), or x @ it where it is (in, out)."""

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, in_out: bool) -> None:
        self._factors = lora_A, lora_B, scaling
        self._weight, self._in_out = weight, in_out

    def _linear(self, x: Tensor) -> Tensor:
        weight = self._weight.T if self._in_out else self._weight
        y: Tensor = LoraFunction.apply(x, weight, None, *self._factors, None)
        return y

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) == 2 and isinstance(args[1], cls) and not args[1]._in_out:
            return args[1]._linear(args[0])
        if func in (Tensor.__matmul__, Tensor.matmul) and isinstance(args[1], cls) and args[1]._in_out:
            return args[1]._linear(args[0])
        raise BadConfig(f"this family's experts use their parameters in {func}, which is not adapted here")


def targeted(module: nn.Module, path: str, target_parameters: Sequence[str]) -> list[str]:
    """Names of the module's own parameters that `target_parameters` mean: each by its path or a dotted end of it."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return [name for name in own if any(matches(f"{path}.{name}", target) for target in target_parameters)]


def parameter_layers(modules: Mapping[str, nn.Module], config: LoraConfig, seed: int | None) -> dict[str, AdapterLayer]:
    """Path → the layer that adapts the `target_parameters` there: those of experts, and weights of linear layers."""
    return {
        path: LoraLinear.from_config(modules[path], path, _of_weight(config, path), seed)
        if isinstance(modules[path], nn.Linear)
        else LoraExperts.from_config(modules[path], path, config, seed)
        for path in _parameter_targets(modules, config)
    }


def _of_weight(config: LoraConfig, path: str) -> LoraConfig:
    """`config` where patterns name the parameter, not the module."""
    name = f"{path}.weight"
    alpha = lookup(config.alpha_pattern, name, config.lora_alpha)
    return replace(config, r=config.rank_for(name), lora_alpha=alpha, rank_pattern={}, alpha_pattern={})


def _parameter_targets(modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """Paths of the modules that hold the `target_parameters`. BadConfig if one of these is nowhere, or cannot be
    adapted."""
    found = {path: targeted(module, path, config.target_parameters) for path, module in modules.items()}
    found = {path: names for path, names in found.items() if names}
    parameters = [f"{path}.{name}" for path, names in found.items() for name in names]
    for target in config.target_parameters:
        if not any(matches(parameter, target) for parameter in parameters):
            raise BadConfig(f"target_parameters names {target}, which the base model has not")
    for path, names in found.items():
        if saving(path, config.saved_names()):
            raise BadConfig(f"{path} has target_parameters and is saved whole by modules_to_save")
        for name in names:
            is_weight = isinstance(modules[path], nn.Linear) and name == "weight"
            if not is_weight and getattr(modules[path], name).ndim != 3:
                raise BadConfig(f"{path}.{name} is neither of experts nor the weight of a linear layer")
    return sorted(found)
