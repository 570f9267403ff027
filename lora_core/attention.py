"""Causal attention of short documents on a processor, where PyTorch's kernel is several times slower than its products.

The scores of some rows at a time are computed, used and forgotten; the backward pass computes them again.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Up to here measured to be faster than scaled_dot_product_attention.
_LONGEST = 1024
_HALF = frozenset({torch.bfloat16, torch.float16})
# Tokens whose scores exist at once: as many as are worth reading the keys for, few enough to stay in the cache.
_TOKENS, _HALF_TOKENS = 96, 192


class DocumentsFunction(torch.autograd.Function):
    """q (1, heads, N, head), k and v (1, key heads, N, head) → (1, N, heads, head), each document by itself."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys, values = (_rows(tensor, key_heads) for tensor in (q, k, v))
        found = torch.empty_like(queries)
        for first, start, end in _blocks(lengths, q.dtype):
            rows = slice(start * group, end * group)
            p = _probabilities(queries[:, rows], keys[:, first:end], end - start, scale)
            found[:, rows] = torch.bmm(p.to(v.dtype), values[:, first:end])
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale = lengths, scale
        return _tokens(found, q.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        key_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        queries, keys, values, dy = (_rows(tensor, key_heads) for tensor in (q, k, v, grad.transpose(1, 2)))
        wide = torch.float32 if q.dtype in _HALF else q.dtype
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys, dtype=wide), torch.zeros_like(keys, dtype=wide)
        for first, start, end in _blocks(ctx.lengths, q.dtype):
            rows, seen = slice(start * group, end * group), slice(first, end)
            own, dout = queries[:, rows], dy[:, rows]
            p = _probabilities(own, keys[:, seen], end - start, ctx.scale)
            dp = torch.bmm(dout, values[:, seen].mT).to(wide)
            ds = torch._softmax_backward_data(dp, p, -1, wide).mul_(ctx.scale).to(q.dtype)
            dv[:, seen] += torch.bmm(p.to(v.dtype).mT, dout)
            dk[:, seen] += torch.bmm(ds.mT, own)
            dq[:, rows] = torch.bmm(ds, keys[:, seen])
        grads = (_tokens(rows.to(q.dtype), q.shape[2]).transpose(1, 2) for rows in (dq, dk, dv))
        return *grads, None, None


def fits(query: Tensor, lengths: Sequence[int]) -> bool:
    """Whether `DocumentsFunction` is the faster way."""
    # Products of float16 that are not scaled yet may be larger than it can say.
    fitting = query.device.type == "cpu" and query.dtype is not torch.float16
    return fitting and len(query) == 1 and max(lengths) <= _LONGEST


def _probabilities(queries: Tensor, keys: Tensor, tokens: int, scale: float) -> Tensor:
    """Of the last `tokens` tokens over all they see, (key heads, tokens · group, seen), float32 at least."""
    scores = torch.bmm(queries, keys.mT)
    scores = scores.float().mul_(scale) if scores.dtype in _HALF else scores.mul_(scale)
    future = torch.full((tokens, tokens), float("-inf"), dtype=scores.dtype).triu_(1)
    scores.view(len(keys), tokens, -1, keys.shape[1])[..., -tokens:].add_(future[:, None])
    return torch.softmax(scores, -1)


def _blocks(lengths: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """The first token of a document, the first of some of its tokens, and their end."""
    first, most = 0, _HALF_TOKENS if dtype in _HALF else _TOKENS
    for length in lengths:
        count = max(1, round(length / most))
        ends = [first + length * index // count for index in range(count + 1)]
        for start, end in pairwise(ends):
            yield first, start, end
        first += length


def _rows(tensor: Tensor, key_heads: int) -> Tensor:
    """(1, heads, N, head) → (key heads, N · group, head), contiguous: what reads one key head lies together."""
    _, heads, length, size = tensor.shape
    grouped = tensor.view(key_heads, heads // key_heads, length, size).transpose(1, 2)
    return grouped.reshape(key_heads, -1, size).contiguous()


def _tokens(rows: Tensor, length: int) -> Tensor:
    """The way back, with the tokens first: (1, N, heads, head)."""
    grouped = rows.view(len(rows), length, -1, rows.shape[-1]).transpose(0, 1)
    return grouped.reshape(1, length, -1, rows.shape[-1])
