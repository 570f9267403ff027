"""Attention inside documents says what PyTorch's own says about each, and so do its gradients."""

import pytest
import torch
from torch.nn import functional as F

from lora_core import attention, packing
from lora_core.attention import DocumentsFunction, fits


def draw(lengths: list[int], heads: int, key_heads: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as a model makes them: (1, N, heads · head) seen as (1, heads, N, head)."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, sum(lengths), count, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def by_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    documents = zip(*(tensor.split(lengths, 2) for tensor in (q, k, v)), strict=True)
    found = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scale, enable_gqa=True) for d in documents]
    return torch.cat(found, 2).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[5], [1, 7, 3], [13, 2]])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_documents_attend_as_if_each_were_alone(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], heads: int, key_heads: int
) -> None:
    monkeypatch.setattr(attention, "_TOKENS", 4)  # the longer ones are cut
    operands = draw(lengths, heads, key_heads, 8, torch.float64)
    found = DocumentsFunction.apply(*operands, lengths, 0.3)
    expected = by_kernel(*operands, lengths, 0.3)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(found, operands, dy), torch.autograd.grad(expected, operands, dy))


def test_gradients_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TOKENS", 2)
    operands = draw([5, 2], 4, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: DocumentsFunction.apply(*t, [5, 2], 0.7), operands)


def test_half_precision_is_as_near_to_the_truth_as_one_rounding_of_it() -> None:
    lengths, scale = [300, 40], 0.2
    operands = draw(lengths, 4, 2, 32, torch.bfloat16)
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    found, truth = DocumentsFunction.apply(*operands, lengths, scale), by_kernel(*exact, lengths, scale)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    gradients = torch.autograd.grad(found, operands, dy)
    truths = torch.autograd.grad(truth, exact, dy.double())
    for mine, true in zip((found, *gradients), (truth, *truths), strict=True):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - true).norm() < torch.finfo(torch.bfloat16).eps * true.norm()


def test_only_the_operands_are_kept_for_the_backward_pass() -> None:
    operands = draw([64, 32], 4, 2, 8, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        DocumentsFunction.apply(*operands, [64, 32], 0.3)
    assert kept == [operand.data_ptr() for operand in operands]


def test_what_is_long_or_not_one_row_is_left_to_the_kernel() -> None:
    row = torch.empty(1, 2, 2000, 4)
    assert fits(row, [1000, 1000])
    assert not fits(row, [2000])
    assert not fits(row.view(2, 2, 1000, 4), [1000])
    assert not fits(row.to("meta"), [1000, 1000])


def test_float16_whose_products_overflow_is_left_to_the_kernel() -> None:
    row = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)
    assert row[0, 0].float().mm(row[0, 0].float().mT).max() > torch.finfo(torch.float16).max
    found, _ = packing.attend(torch.nn.Identity(), row, row, row, None, document_lengths=[3, 1])
    torch.testing.assert_close(found, row.transpose(1, 2))
