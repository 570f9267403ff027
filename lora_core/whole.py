"""Modules that are trained whole, or whose bias is: copies beside the base, which stays as it was."""

import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.errors import BadConfig
from lora_core.layer import AdapterLayer


class SavedModule(AdapterLayer):
    """A copy of the base module, all its parameters trained in float32 and used in the dtype of the base."""

    def __init__(self, base_layer: nn.Module, *, path: str) -> None:
        super().__init__(base_layer, path=path)
        if any(True for _ in base_layer.buffers()):
            raise BadConfig(f"modules_to_save names {path}, which holds more than parameters")
        self.trained = copy.deepcopy(base_layer).to(torch.float32).requires_grad_(requires_grad=True)
        self._dtypes = {name: parameter.dtype for name, parameter in base_layer.named_parameters()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy makes of the arguments."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        if set(self._dtypes.values()) == {torch.float32}:
            return self.trained(*args, **kwargs)
        used = {name: parameter.to(self._dtypes[name]) for name, parameter in self.trained.named_parameters()}
        return functional_call(self.trained, used, args, kwargs)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The copy's parameters by the names they have in the module."""
        return dict(self.trained.named_parameters())

    def has_learned(self) -> bool:
        """Whether a parameter differs from the base's."""
        base = dict(self.base_layer.named_parameters())
        return any(
            not torch.equal(value, base[name].to(value.dtype)) for name, value in self.trained.named_parameters()
        )

    def __getattr__(self, name: str) -> Any:
        """The rest of the model asks the copy: a sibling may use its weight directly."""
        if name in ("trained", "base_layer") or not self.enabled:
            return super().__getattr__(name)
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return getattr(nn.Module.__getattr__(self, "trained"), name)


class TrainedBias(AdapterLayer):
    """The base module with a bias of its own in place of the base's; its other parameters are the base's."""

    TENSORS = MappingProxyType({"bias": "trained_bias"})

    def __init__(self, base_layer: nn.Module, *, path: str) -> None:
        super().__init__(base_layer, path=path)
        self.trained_bias = nn.Parameter(self.base_layer.bias.detach().to(torch.float32, copy=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base makes of the arguments with the trained bias."""
        base = self.base_layer
        if not self.enabled:
            return base(*args, **kwargs)
        return functional_call(base, {"bias": self.trained_bias.to(base.bias.dtype)}, args, kwargs)

    def has_learned(self) -> bool:
        """Whether the bias differs from the base's."""
        return not torch.equal(self.trained_bias, self.base_layer.bias.to(self.trained_bias.dtype))
