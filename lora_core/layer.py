"""What all adapted modules have in common: a frozen base layer, trained tensors, and PEFT's names for them."""

import hashlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig, KeyMismatch, ShapeMismatch

_FACTORS = ("lora_A", "lora_B.weight", "lora_E", "lora_embedding_")


class AdapterLayer(nn.Module):
    """Stands in the model where `base_layer`, which it freezes, stood under the name `path`.

    With `enabled` = False it computes exactly what the base computes. What else the rest of the model asks of it
    (weight, bias, embedding_dim, …) is the base layer's.
    """

    # PEFT's name of a trained tensor, after the module's path → the attribute that holds it, or None
    TENSORS: ClassVar[Mapping[str, str]] = {}

    def __init__(self, base_layer: nn.Module, *, path: str) -> None:
        super().__init__()
        self.base_layer: Any = base_layer.requires_grad_(requires_grad=False)
        self.path = path
        self.enabled = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name in self.TENSORS.values():
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What this layer adds to an adapter file: PEFT's name, after the module's path → the trained tensor."""
        found = {name: getattr(self, attribute) for name, attribute in self.TENSORS.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of `tensors`, named like `adapter_tensors`. Nothing changes if one does not fit.

        A factor without numbers yet becomes the given tensor itself where that is float32 on the base's device.
        """
        own = self.adapter_tensors()
        if wrong := sorted(own.keys() ^ tensors.keys()):
            problem = "is missing" if wrong[0] in own else "has no place in this layer"
            raise KeyMismatch(f"{self.path}.{wrong[0]} {problem}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                wanted = list(own[name].shape)
                raise ShapeMismatch(f"{self.path}.{name} has shape {list(tensor.shape)}, not {wanted}")
        for name, tensor in tensors.items():
            if own[name].is_meta:
                device = next(self.base_layer.parameters()).device
                given = tensor.to(device, torch.float32)
                setattr(self, self.TENSORS[name], nn.Parameter(given))
            else:
                own[name].copy_(tensor)

    def has_learned(self) -> bool:
        """Whether it changes what the base computes, as far as its numbers alone tell."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, ...]:
        """What decides, besides tensors, what it computes."""
        return ()

    def rescale(self, factor: float) -> None:
        """Add `factor` times as much to the base's weights. What replaces the base's own stays as it is."""

    def training_state(self) -> dict[str, Tensor]:
        """What a run goes on with besides parameters, by names of the layer's own: restored in place."""
        return {}


class LoraLayer(AdapterLayer):
    """`base_layer` plus scaling · (a product of rank r); all that is trained is float32.

    `path` is the module's name in the model: with `seed` it alone decides the start of the factors, whatever else
    the model holds; without a seed they have no numbers until `load_tensors` brings them. `trained_bias` takes the
    place of the base's bias, `lora_B_bias` is part of what is scaled and added; each is None unless asked for.
    """

    TENSORS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"base_layer.bias": "trained_bias", "lora_B.bias": "lora_B_bias"}
    )
    trained_bias: nn.Parameter | None
    lora_B_bias: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        path: str,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        seed: int | None = 0,
    ) -> None:
        super().__init__(base_layer, path=path)
        self.r = r
        self.scaling = scaling
        self.lora_dropout = lora_dropout
        self.seed = seed
        self.register_parameter("trained_bias", None)
        self.register_parameter("lora_B_bias", None)

    @classmethod
    def from_config(cls, base_layer: Any, path: str, config: LoraConfig, seed: int | None, **more: Any) -> Self:
        """The layer that `config` asks for in the place `path`. BadConfig if this kind of module cannot be that."""
        layer = cls(
            base_layer,
            path=path,
            r=config.rank_for(path),
            scaling=config.scaling_for(path),
            lora_dropout=config.lora_dropout,
            seed=seed,
            **cls.options(config),
            **more,
        )
        bias = getattr(base_layer, "bias", None)
        if config.bias != "none" and bias is not None:
            layer.trained_bias = nn.Parameter(bias.detach().to(torch.float32, copy=True))
        if config.lora_bias:
            layer.add_lora_bias()
        return layer

    @classmethod
    def options(cls, config: LoraConfig) -> dict[str, Any]:
        """What this kind of layer wants to know of `config` besides rank, scaling, dropout and seed."""
        return {"gaussian": config.init_lora_weights == "gaussian"}

    def settings(self) -> tuple[Any, ...]:
        return self.scaling, self.lora_dropout

    def rescale(self, factor: float) -> None:
        self.scaling *= factor

    def add_lora_bias(self) -> None:
        """Give lora_B a bias, at zero."""
        bias = getattr(self.base_layer, "bias", None)
        if bias is None:
            raise BadConfig(f"lora_bias adds to the bias of {self.path}, which has none")
        self.lora_B_bias = self.zeros(*bias.shape)

    def bias_to_add(self) -> Tensor | None:
        """The bias of the adapted layer, float32, if it is not just the base's."""
        bias: Tensor | None = self.trained_bias
        if self.lora_B_bias is not None:
            bias = (self.base_layer.bias if bias is None else bias) + self.scaling * self.lora_B_bias
        return bias

    def has_learned(self) -> bool:
        """Whether no factor of the product is all zero, or a bias differs."""
        factors = [tensor for name, tensor in self.adapter_tensors().items() if name.startswith(_FACTORS)]
        bias, added = self.trained_bias, self.lora_B_bias
        if added is not None and bool(added.any()):
            return True
        if bias is not None and not torch.equal(bias, self.base_layer.bias.to(bias.dtype)):
            return True
        return all(bool(factor.any()) for factor in factors)

    def delta_weight(self) -> Tensor:
        """What the layer adds to the base's weight, float32, in its shape and orientation."""
        raise NotImplementedError

    def start(self, shape: tuple[int, ...], fan_in: int, *, gaussian: bool) -> nn.Parameter:
        """A factor as it is before training: Kaiming-uniform (a = √5), or normal with deviation 1/r."""
        if gaussian:
            return self.start_normal(shape, 1 / self.r)
        bound = 1 / math.sqrt(fan_in)  # what kaiming_uniform_ with a = √5 comes to
        return self._factor(shape, lambda factor: factor.uniform_(-bound, bound, generator=self._generator()))

    def start_normal(self, shape: tuple[int, ...], deviation: float) -> nn.Parameter:
        """A factor that starts normal."""
        return self._factor(shape, lambda factor: factor.normal_(0.0, deviation, generator=self._generator()))

    def zeros(self, *shape: int) -> nn.Parameter:
        """A factor that starts at zero, beside the base's weight."""
        return self._factor(shape, Tensor.zero_)

    def _factor(self, shape: tuple[int, ...], fill: Callable[[Tensor], Tensor]) -> nn.Parameter:
        if self.seed is None:
            return nn.Parameter(torch.empty(shape, device="meta"))
        return nn.Parameter(fill(torch.empty(shape, dtype=torch.float32)).to(self.base_layer.weight.device))

    def _generator(self) -> torch.Generator:
        return start_generator(self.seed, self.path)


def start_generator(seed: int | None, path: str) -> torch.Generator:
    """What the start of a factor is drawn from: of `path` its own, so that nothing else in the model matters."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
