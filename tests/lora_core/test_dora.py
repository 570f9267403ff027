"""DoRA: gradients, PEFT's layer as the oracle, files both ways, merges."""

import itertools

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_core.dora import DoraConv1D, DoraFunction, DoraLinear
from lora_core.errors import BadConfig


def operands(*, keep: bool):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (4, 5), "A": (2, 5), "B": (4, 2), "magnitude": (4,), "norm": (4,)}
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes.values()]
    mask = (torch.rand(2, 3, 5, generator=g) > 0.4).double() / 0.6 if keep else None
    return [*made[:-1], made[-1].abs() + 1, 1.7, mask]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=4) if any(n)])
def test_gradients_are_right_for_every_combination_of_those_wanted(needs, keep):
    given = operands(keep=keep)
    wanted = [given[i] for i in (0, 2, 3, 4)]
    for tensor, need in zip(wanted, needs, strict=True):
        tensor.requires_grad_(need)
    assert torch.autograd.gradcheck(DoraFunction.apply, given)
    DoraFunction.apply(*given).sum().backward()
    assert tuple(tensor.grad is not None for tensor in wanted) == needs


class Net(nn.Module):
    def __init__(self, kind: str, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24, bias=bias)
        nn.init.normal_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)


OURS = {"linear": DoraLinear, "conv1d": DoraConv1D}


def pair(kind: str, *, bias: bool = True, dropout: float = 0.0):
    """The same adapted layer by PEFT and by us, with numbers as after some training."""
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": ["layer"], "use_dora": True}
    theirs = peft.get_peft_model(Net(kind, bias=bias), peft.LoraConfig(**settings))
    ours = OURS[kind](Net(kind, bias=bias).layer, path="layer", r=4, scaling=1.5, lora_dropout=dropout)
    state = peft.get_peft_model_state_dict(theirs)
    g = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=g) * 0.3
        state[name] = tensor + noise.abs() if "magnitude" in name else noise
    peft.set_peft_model_state_dict(theirs, state)
    ours.load_tensors({name.removeprefix("base_model.model.layer."): tensor for name, tensor in state.items()})
    return ours, theirs


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", OURS)
def test_outputs_and_gradients_are_those_of_peft(kind, bias, dropout):
    ours, theirs = pair(kind, bias=bias, dropout=dropout)
    results = []
    for module in (ours.train(), theirs.train()):
        x = torch.linspace(-1, 1, 96).view(2, 3, 16).requires_grad_()
        torch.manual_seed(5)  # the same dropout
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-5)
    layer = theirs.base_model.model.layer
    for mine, other in (
        (ours.lora_A, layer.lora_A["default"].weight),
        (ours.lora_B, layer.lora_B["default"].weight),
        (ours.lora_magnitude_vector, layer.lora_magnitude_vector["default"].weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OURS)
def test_delta_weight_is_what_peft_merges(kind):
    ours, theirs = pair(kind)
    merged = theirs.merge_and_unload().layer.weight
    torch.testing.assert_close(ours.base_layer.weight + ours.delta_weight(), merged, atol=1e-6, rtol=1e-5)


def test_a_fresh_layer_changes_nothing_but_rounding():
    fresh = DoraLinear(nn.Linear(16, 24), path="a", r=4, scaling=1.0)
    x = torch.randn(7, 16)
    torch.testing.assert_close(fresh(x), fresh.base_layer(x))
    assert not fresh.has_learned()
    with torch.no_grad():
        fresh.lora_magnitude_vector[3] += 0.01
    assert fresh.has_learned()
    fresh.enabled = False
    assert torch.equal(fresh(x), fresh.base_layer(x))


def test_lengths_are_found_again_when_a_factor_changed_and_only_then():
    layer, _ = pair("linear")
    first = layer.eval().norm()
    assert layer.norm() is first
    with torch.no_grad():
        layer.lora_A.mul_(2)
    assert not torch.equal(layer.norm(), first)
    flat = layer.lora_A.data  # what shares its memory only
    layer.train()
    assert layer.norm() is not layer.norm()
    flat.mul_(2)
    layer.eval()
    expected = (layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1)
    torch.testing.assert_close(layer.norm(), expected)


def test_lengths_of_half_precision_weights_are_found_in_float32():
    base = nn.Linear(64, 24, dtype=torch.bfloat16)
    layer = DoraLinear(base, path="a", r=4, scaling=1.5)
    nn.init.normal_(layer.lora_B)
    expected = (base.weight.float() + 1.5 * layer.lora_B @ layer.lora_A).norm(dim=1)
    torch.testing.assert_close(layer.norm(), expected)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_row_without_a_direction_is_refused():
    base = nn.Linear(16, 24)
    base.weight.data[3] = 0
    with pytest.raises(BadConfig, match="row 3 of a is all zero"):
        DoraLinear(base, path="a", r=4, scaling=1.0)
