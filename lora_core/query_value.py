"""Query and value projections inside a fused layer: two LoRAs that together are one of twice the rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.layers import LoraConv1D, LoraLinear
from lora_core.principal import as_plain
from lora_core.targets import FUSED


class QueryValueLinear(LoraLinear):
    """y = base(x), and scaling · x·AᵀBᵀ of rank r on the outputs `queries` and another on `values`; keys stay.

    `lora_A` (2r, in) has the two A below each other, `lora_B` (queries + values, r) the two B. To the world the layer
    is a plain LoRA of rank 2r whose B has two blocks.
    """

    def __init__(self, base_layer: nn.Module, *, queries: Tensor, values: Tensor, **settings: Any) -> None:
        super().__init__(base_layer, **settings)
        out_features, in_features = self.matrix().shape
        self._out_features = out_features
        device = self.matrix().device
        self.register_buffer("queries", queries.to(device), persistent=False)
        self.register_buffer("values", values.to(device), persistent=False)
        self.lora_A = self.start((2 * self.r, in_features), in_features, gaussian=settings.get("gaussian", False))
        self.lora_B = self.zeros(len(queries) + len(values), self.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(2r, in) and (out, 2r)."""
        of_queries, of_values = self.lora_B.split([len(self.queries), len(self.values)])
        lora_B = self.lora_B.new_zeros(self._out_features, 2 * self.r)
        lora_B[self.queries, : self.r] = of_queries
        lora_B[self.values, self.r :] = of_values
        return self.lora_A, lora_B

    def adapter_tensors(self) -> dict[str, Tensor]:
        """A plain LoRA of twice the rank."""
        lora_A, lora_B = self.factors()
        return super().adapter_tensors() | {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: ARG002  none can be taken
        """Refused: what was saved is a plain LoRA, and `load_adapter` makes plain layers for it."""
        raise BadConfig(f"{self.path} trains queries and values apart; load the adapter into a fresh base")


class QueryValueConv1D(QueryValueLinear, LoraConv1D):
    """The same over transformers' Conv1D, which stores (in, out)."""


def is_fused(path: str) -> bool:
    """Whether queries, keys and values are one layer of this name."""
    return path.rpartition(".")[2] in FUSED


def query_value_layer(
    base_layer: Any, path: str, config: LoraConfig, seed: int | None, model_config: Any
) -> QueryValueLinear:
    """The layer in the place `path` that adapts queries and values only. BadConfig for a family that is not known."""
    as_plain(config)  # BadConfig now, rather than at the end, if twice the rank is too much
    kind = QueryValueConv1D if isinstance(base_layer, Conv1D) else QueryValueLinear
    out_features = base_layer.nf if isinstance(base_layer, Conv1D) else base_layer.out_features
    queries, values = query_and_value_rows(model_config, out_features)
    return kind.from_config(base_layer, path, config, seed, queries=queries, values=values)


def query_and_value_rows(model_config: Any, out_features: int) -> tuple[Tensor, Tensor]:
    """Which outputs of the fused layer are queries and which values, as the family's model cuts them."""
    family = getattr(model_config, "model_type", None)
    rows = torch.arange(out_features)
    if family == "gpt2":
        by_kind = rows.view(3, -1)
        return by_kind[0], by_kind[2]
    if family == "phi3":
        heads, shared = model_config.num_attention_heads, model_config.num_key_value_heads
        by_head = rows.view(heads + 2 * shared, -1)
        return by_head[:heads].flatten(), by_head[heads + shared :].flatten()
    if family in ("gpt_neox", "bloom") or (family == "falcon" and _is_like_bloom(model_config)):
        by_head = rows.view(model_config.num_attention_heads, 3, -1)
        return by_head[:, 0].flatten(), by_head[:, 2].flatten()
    if family == "falcon":  # each group of queries shares the key and the value after it
        groups = model_config.num_kv_heads if model_config.new_decoder_architecture else 1
        by_group = rows.view(groups, model_config.num_attention_heads // groups + 2, -1)
        return by_group[:, :-2].flatten(), by_group[:, -1].flatten()
    raise BadConfig(f"where queries and values lie in the fused layer of {family!r} is not known; name the whole layer")


def _is_like_bloom(model_config: Any) -> bool:
    return not (model_config.new_decoder_architecture or model_config.multi_query)
