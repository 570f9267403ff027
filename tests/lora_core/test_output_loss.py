import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core import output_loss
from lora_core.output_loss import OutputLoss, token_losses


def operands(*, bias: bool, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=g, dtype=dtype) for shape in ((7, 4), (11, 4)))
    targets = torch.randint(0, 11, (7,), generator=g)
    return hidden, weight, torch.randn(11, generator=g, dtype=dtype) if bias else None, targets


@pytest.mark.parametrize(("bias", "rows", "scale"), list(itertools.product([False, True], [2, 7, 100], [1.0, 0.25])))
def test_loss_and_gradient_are_those_of_cross_entropy(monkeypatch, bias, rows, scale):
    monkeypatch.setattr(output_loss, "_CACHED_BYTES", 3 * 11 * 4)  # three rows
    hidden, weight, b, targets = operands(bias=bias)
    expected = F.cross_entropy(F.linear(hidden, weight, b) * scale, targets, reduction="none")
    torch.testing.assert_close(OutputLoss.apply(hidden, weight, b, targets, scale, rows), expected)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(OutputLoss.apply, (hidden, weight, b, targets, scale, rows))


def test_without_a_gradient_nothing_is_kept():
    hidden, weight, b, targets = operands(bias=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert not OutputLoss.apply(hidden, weight, b, targets, 1.0, 2).requires_grad
        OutputLoss.apply(hidden.requires_grad_(), weight, b, targets, 1.0, 2)
    assert [tensor.shape for tensor in saved] == [hidden.shape]


@pytest.mark.parametrize("trained", [False, True])
def test_an_output_layer_that_is_trained_gets_its_gradient(trained):
    hidden, weight, b, targets = operands(bias=True, dtype=torch.float32)
    layer = nn.Linear(4, 11)
    layer.load_state_dict({"weight": weight, "bias": b})
    layer.requires_grad_(trained)
    loss = token_losses(hidden.requires_grad_(), layer, targets).sum()
    torch.testing.assert_close(loss, F.cross_entropy(layer(hidden), targets, reduction="sum"))
    loss.backward()
    assert (layer.weight.grad is not None) == trained


def test_bfloat16_sums_in_float32():
    hidden, weight, _, targets = operands(bias=False, dtype=torch.bfloat16)
    layer = nn.Linear(4, 11, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    losses = token_losses(hidden.requires_grad_(), layer.requires_grad_(False), targets)
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    found, wanted = (torch.autograd.grad(loss.sum(), hidden)[0] for loss in (losses, expected))
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_no_label_at_all_is_no_loss():
    hidden, _, _, targets = operands(bias=False, dtype=torch.float32)
    layer = nn.Linear(4, 11, bias=False).requires_grad_(False)
    assert token_losses(hidden[:0], layer, targets[:0]).sum() == 0
