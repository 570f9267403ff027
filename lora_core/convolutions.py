"""LoRA of convolutions: two convolutions, the first to r channels, the second pointwise."""

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.errors import BadConfig
from lora_core.layer import LoraLayer

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LoraConv(LoraLayer):
    """y = base(x) + scaling · B∗(A∗x) over a convolution in 1, 2 or 3 dimensions.

    lora_A (r, in, *kernel) has the base's stride and padding, lora_B (out, r, 1, …) starts at zero.
    """

    TENSORS = MappingProxyType({"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", **LoraLayer.TENSORS})

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        path: str,
        r: int,
        scaling: float,
        lora_dropout: float = 0.0,
        gaussian: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_layer, path=path, r=r, scaling=scaling, lora_dropout=lora_dropout, seed=seed)
        base = self.base_layer
        if base.groups != 1 or set(base.dilation) != {1} or base.padding_mode != "zeros":
            raise BadConfig(f"{path} is a grouped, dilated or circular convolution; only plain ones are adapted")
        out_channels, *inputs = base.weight.shape
        self.lora_A = self.start((r, *inputs), base.weight[0].numel(), gaussian=gaussian)
        self.lora_B = self.zeros(out_channels, r, *(1 for _ in base.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in, *space) → (batch, out, *space)."""
        base = self.base_layer
        if not self.enabled:
            return base(x)
        added = self.added(F.dropout(x, self.lora_dropout, training=self.training))
        bias = self.bias_to_add()
        if bias is None:
            return base(x) + added
        y = self.convolve(x, base.weight)
        return y + bias.to(y.dtype).reshape(-1, *(1 for _ in base.kernel_size)) + added

    def convolve(self, x: Tensor, filters: Tensor) -> Tensor:
        """`x` under `filters` (channels, in, *kernel), with the base's stride and padding."""
        base = self.base_layer
        return _CONVOLVE[filters.ndim](x, filters.to(x.dtype), stride=base.stride, padding=base.padding)

    def added(self, x: Tensor) -> Tensor:
        """scaling · B∗(A∗x)."""
        lora_B = self.lora_B.to(x.dtype)
        return self.scaling * _CONVOLVE[lora_B.ndim](self.convolve(x, self.lora_A), lora_B)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · lora_B · lora_A, (out, in, *kernel), float32."""
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return self.scaling * product.reshape(self.base_layer.weight.shape)
