"""Which layer adapts which kind of module: one table for each variant of LoRA."""

from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.adalora import AdaLoraConv1D, AdaLoraLinear, with_ranks
from lora_core.adalora_config import AdaLoraConfig
from lora_core.config import CHANGE_THE_START, LoraConfig
from lora_core.convolutions import LoraConv
from lora_core.dora import DoraConv, DoraConv1D, DoraEmbedding, DoraLinear
from lora_core.embeddings import LoraEmbedding
from lora_core.layer import LoraLayer
from lora_core.layers import LoraConv1D, LoraLinear
from lora_core.principal import PrincipalConv1D, PrincipalLinear, as_plain
from lora_core.query_value import QueryValueLinear

Kinds = Mapping[type[nn.Module], type[LoraLayer]]

LORA: Kinds = {
    nn.Linear: LoraLinear,
    Conv1D: LoraConv1D,
    nn.Embedding: LoraEmbedding,
    nn.Conv1d: LoraConv,
    nn.Conv2d: LoraConv,
    nn.Conv3d: LoraConv,
}
DORA: Kinds = {
    nn.Linear: DoraLinear,
    Conv1D: DoraConv1D,
    nn.Embedding: DoraEmbedding,
    nn.Conv1d: DoraConv,
    nn.Conv2d: DoraConv,
    nn.Conv3d: DoraConv,
}
ADALORA: Kinds = {nn.Linear: AdaLoraLinear, Conv1D: AdaLoraConv1D}
PRINCIPAL: Kinds = {nn.Linear: PrincipalLinear, Conv1D: PrincipalConv1D}


def kinds_for(config: LoraConfig) -> Kinds:
    """Kind of base module → the layer that adapts it as `config` asks."""
    if isinstance(config, AdaLoraConfig):
        return ADALORA
    if config.use_dora:
        return DORA
    return PRINCIPAL if config.init_lora_weights in CHANGE_THE_START else LORA


def as_saved(config: LoraConfig, layers: Mapping[str, LoraLayer]) -> LoraConfig:
    """The configuration that fits the tensors which `layers` save."""
    if isinstance(config, AdaLoraConfig):
        return with_ranks(config, layers)
    apart = any(isinstance(layer, QueryValueLinear) for layer in layers.values())
    twice = apart or config.init_lora_weights in CHANGE_THE_START
    return as_plain(config) if twice else config
