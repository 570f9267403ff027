import itertools

import pytest
import torch
from torch import nn

from lora_core.layers import LoraFunction, LoraLinear


def operands(*, bias: bool, keep: bool):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (4, 5), "bias": (4,), "A": (2, 5), "B": (4, 2)}
    made = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    mask = (torch.rand(2, 3, 5, generator=g) > 0.4).double() / 0.6 if keep else None
    return made["x"], made["weight"], made["bias"] if bias else None, made["A"], made["B"], 1.7, mask


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)])
def test_gradients_are_right_for_every_combination_of_those_wanted(needs, bias, keep):
    x, weight, b, A, B, scaling, mask = operands(bias=bias, keep=keep)
    for tensor, need in zip((x, A, B), needs, strict=True):
        tensor.requires_grad_(need)
    assert torch.autograd.gradcheck(LoraFunction.apply, (x, weight, b, A, B, scaling, mask))
    LoraFunction.apply(x, weight, b, A, B, scaling, mask).sum().backward()
    assert tuple(tensor.grad is not None for tensor in (x, A, B)) == needs


@pytest.mark.parametrize("keep", [False, True])
def test_the_formula(keep):
    x, weight, b, A, B, scaling, mask = operands(bias=True, keep=keep)
    dropped = x if mask is None else x * mask
    expected = x @ weight.T + b + scaling * (dropped @ A.T @ B.T)
    torch.testing.assert_close(LoraFunction.apply(x, weight, b, A, B, scaling, mask), expected)


def layer(path="a", *, seed=0, r=4, **settings) -> LoraLinear:
    torch.manual_seed(1)
    return LoraLinear(nn.Linear(64, 32), path=path, r=r, scaling=2.0, seed=seed, **settings)


def test_a_fresh_layer_changes_nothing():
    fresh, x = layer(), torch.randn(7, 64)
    assert torch.equal(fresh(x), fresh.base_layer(x))
    assert not fresh.base_layer.weight.requires_grad
    assert not fresh.base_layer.bias.requires_grad


def test_delta_weight_is_what_forward_adds():
    adapted, x = layer(), torch.randn(7, 64)
    nn.init.normal_(adapted.lora_B)
    torch.testing.assert_close(adapted(x), adapted.base_layer(x) + x @ adapted.delta_weight().T, atol=1e-5, rtol=1e-5)


def test_the_start_depends_on_seed_and_path_only():
    first = layer("a").lora_A
    torch.rand(100)  # the global generator has no part in it
    assert torch.equal(first, LoraLinear(nn.Linear(64, 32), path="a", r=4, scaling=1.0).lora_A)
    assert not torch.equal(first, layer("b").lora_A)
    assert not torch.equal(first, layer("a", seed=1).lora_A)


def test_the_start_is_uniform_within_one_over_the_root_of_the_inputs():
    start = layer(r=64).lora_A
    assert start.abs().max() <= 1 / 8
    assert start.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_the_gaussian_start_has_deviation_one_over_r():
    assert layer(r=16, gaussian=True).lora_A.std().item() == pytest.approx(1 / 16, rel=0.1)


def test_dropout_acts_in_training_and_on_the_lora_branch_only():
    dropping, x = layer(lora_dropout=0.5), torch.randn(7, 64)
    assert torch.equal(dropping.train()(x), dropping.base_layer(x))  # lora_B is zero
    nn.init.normal_(dropping.lora_B)
    assert not torch.equal(dropping(x), dropping(x))
    assert torch.equal(dropping.eval()(x), dropping(x))


def test_half_precision_inputs_are_not_copied_to_float32():
    half = layer()
    half.base_layer.to(torch.bfloat16)
    saved: list[torch.Tensor] = []
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = half(x)
    assert y.dtype == torch.bfloat16
    assert [t.shape for t in saved if t.numel() == x.numel() and t.data_ptr() != x.data_ptr()] == []
    y.sum().backward()
    assert half.lora_B.grad.dtype == torch.float32


def test_a_model_may_add_to_the_output_in_place():
    """Falcon does; autograd refuses it on a view that a custom function made."""
    adapted, x = layer(), torch.randn(2, 3, 64)
    expected = torch.autograd.grad((adapted(x) + 1).square().sum(), adapted.lora_B)[0]
    out = adapted(x)
    out += 1
    assert torch.equal(torch.autograd.grad(out.square().sum(), adapted.lora_B)[0], expected)
