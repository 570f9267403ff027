"""Adapted embeddings: LoRA of the whole table, or new rows for a few tokens, which a tied output layer shares."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.layer import AdapterLayer, LoraLayer


class LoraEmbedding(LoraLayer):
    """y = base(x) + scaling · the rows x of (lora_embedding_B · lora_embedding_A)ᵀ.

    lora_embedding_A (r, tokens) starts at zero, lora_embedding_B (dim, r) normal, as in PEFT: a lookup sees few rows
    of A, and with A at random but B at zero most of it would stay as it began. Dropout does not apply.
    """

    TENSORS = MappingProxyType(
        {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}
    )  # an embedding has no bias

    def __init__(
        self, base_layer: nn.Embedding, *, path: str, r: int, scaling: float, lora_dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(base_layer, path=path, r=r, scaling=scaling, lora_dropout=lora_dropout, seed=seed)
        self.lora_embedding_A = self.zeros(r, base_layer.num_embeddings)
        self.lora_embedding_B = self.start_normal((base_layer.embedding_dim, r), 1.0)

    @classmethod
    def options(cls, config: LoraConfig) -> dict[str, Any]:
        """Nothing: how the factors start is not a choice."""
        del config
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Token ids x (…) → (…, dim)."""
        base = self.base_layer
        y = base(x)
        if not self.enabled:
            return y
        rows = F.embedding(x, self.lora_embedding_A.T, padding_idx=base.padding_idx)  # (…, r)
        added = self.scaling * (rows @ self.lora_embedding_B.T)
        return (y + _scaled(base, added)).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """(scaling · lora_embedding_B · lora_embedding_A)ᵀ, (tokens, dim), float32."""
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


class TokenRows(AdapterLayer):
    """An embedding whose rows `indices` are replaced by `new_rows` (n, dim), which start as the base's."""

    TENSORS = MappingProxyType({"token_adapter.trainable_tokens_delta": "new_rows"})  # PEFT calls them delta

    def __init__(self, base_layer: nn.Module, *, path: str, indices: Sequence[int]) -> None:
        super().__init__(base_layer, path=path)
        weight: Tensor = self.base_layer.weight
        if max(indices) >= len(weight):
            raise BadConfig(f"trainable_token_indices names {max(indices)}, but {path} has {len(weight)} tokens")
        self.indices = tuple(indices)
        where = torch.full((len(weight),), -1, device=weight.device)
        where[list(indices)] = torch.arange(len(indices), device=weight.device)
        self.register_buffer("position", where, persistent=False)  # of a token in new_rows, or −1
        self.new_rows = nn.Parameter(weight.detach()[list(indices)].to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Token ids x (…) → (…, dim)."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        position = self.position[x]
        new = F.embedding(position.clamp(min=0), self.new_rows).to(y.dtype)
        return torch.where((position >= 0)[..., None], _scaled(self.base_layer, new), y)

    def settings(self) -> tuple[Any, ...]:
        return self.indices

    def has_learned(self) -> bool:
        """Whether a row differs from the base's."""
        rows = self.base_layer.weight[list(self.indices)]
        return not torch.equal(self.new_rows, rows.to(self.new_rows.dtype))


class TokenOutputs(TokenRows):
    """An output layer with new rows of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, dim) → logits (…, tokens)."""
        return self.with_rows(x, self.new_rows)

    def with_rows(self, x: Tensor, new_rows: Tensor) -> Tensor:
        """The logits with `new_rows` (n, dim) in the place of the base's."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        columns = torch.tensor(self.indices, device=y.device)
        logits = F.linear(x, new_rows.to(x.dtype))
        if self.base_layer.bias is not None:
            logits = logits + self.base_layer.bias[columns]
        return y.index_copy(-1, columns, logits)


class TiedTokenOutputs(TokenOutputs):
    """An output layer that shares its matrix with an embedding, and so the embedding's new rows."""

    TENSORS = MappingProxyType({})  # stored once, with the embedding

    def __init__(self, base_layer: nn.Module, *, path: str, embedding: TokenRows) -> None:
        super().__init__(base_layer, path=path, indices=embedding.indices)
        del self.new_rows
        self._embedding = (embedding,)  # in a tuple, so that its parameters are not counted twice

    def forward(self, x: Tensor) -> Tensor:
        """x (…, dim) → logits (…, tokens)."""
        return self.with_rows(x, self._embedding[0].new_rows)

    def has_learned(self) -> bool:
        """What is learned is the embedding's."""
        return False


def _scaled(base_layer: nn.Module, rows: Tensor) -> Tensor:
    """Times that by which some families' embeddings multiply what they look up."""
    scale: Any = getattr(base_layer, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
