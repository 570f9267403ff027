"""The fused passes compute what the modules they stand for compute, and their gradients are right."""

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.fused import GatedFunction, LinearsFunction, Part, RMSNormFunction
from lora_core.fusing import fused_modules
from lora_core.inject import adapter_disabled, inject, lora_layers
from lora_core.loss import collate, loss_sum
from lora_core.model import load_base
from lora_core.trainable import trained_parameters
from tests.tiny import FAMILIES, make_base, make_rows

COMBINATIONS = [n for n in itertools.product([False, True], repeat=5) if any(n)]


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def wanting(tensors: list[torch.Tensor], needs: tuple[bool, ...]) -> None:
    for tensor, need in zip(tensors, needs, strict=True):
        tensor.requires_grad_(need)


@pytest.mark.parametrize("needs", COMBINATIONS)
def test_gradients_of_sibling_layers_for_every_combination_of_those_wanted(needs: tuple[bool, ...]) -> None:
    x, A1, B1, A2, B2, W1, W2, bias = draw((2, 3, 5), (2, 5), (4, 2), (3, 5), (6, 3), (4, 5), (6, 5), (6,))
    wanting([x, A1, B1, A2, B2], needs)
    parts = [Part(W1, None, 1.7), Part(W2, bias, 0.5)]

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return LinearsFunction.apply(operands[0], parts, *operands[1:])

    assert torch.autograd.gradcheck(run, (x, A1, B1, A2, B2))
    sum(y.sum() for y in run(x, A1, B1, A2, B2)).backward()
    assert tuple(tensor.grad is not None for tensor in (x, A1, B1, A2, B2)) == needs


def test_the_formula_of_sibling_layers() -> None:
    x, A, B, W1, W2, bias = draw((2, 3, 5), (2, 5), (4, 2), (4, 5), (6, 5), (6,))
    one, other = LinearsFunction.apply(x, [Part(W1, None, 1.7), Part(W2, bias, 0.0)], A, B, None, None)
    torch.testing.assert_close(one, x @ W1.T + 1.7 * (x @ A.T @ B.T))
    torch.testing.assert_close(other, x @ W2.T + bias)


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=7) if any(n)])
@pytest.mark.parametrize("act", [F.silu, nn.GELU(approximate="tanh")])
def test_gradients_of_a_gated_block_for_every_combination_of_those_wanted(needs: tuple[bool, ...], act) -> None:
    x, Ag, Bg, Au, Bu, Ad, Bd = operands = draw((2, 4), (2, 4), (3, 2), (1, 4), (3, 1), (2, 3), (4, 2))
    Wg, Wu, Wd = draw((3, 4), (3, 4), (4, 3))
    wanting(operands, needs)
    parts = [Part(Wg, None, 1.3), Part(Wu, None, 0.7), Part(Wd, None, 0.9)]

    def run(first: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        return GatedFunction.apply(first, parts, act, *factors)

    expected = act(x @ (Wg + 1.3 * Bg @ Ag).T) * (x @ (Wu + 0.7 * Bu @ Au).T) @ (Wd + 0.9 * Bd @ Ad).T
    torch.testing.assert_close(run(*operands), expected)
    assert torch.autograd.gradcheck(run, tuple(operands))


def test_gradients_of_a_gated_block_with_one_adapted_layer() -> None:
    x, A, B, Wg, Wu, Wd = draw((2, 4), (2, 4), (3, 2), (3, 4), (3, 4), (4, 3))
    parts = [Part(Wg, None, 0.0), Part(Wu, None, 0.7), Part(Wd, None, 0.0)]
    wanting([x, A, B], (True, True, True))
    assert torch.autograd.gradcheck(
        lambda *t: GatedFunction.apply(t[0], parts, F.silu, None, None, t[1], t[2], None, None), (x, A, B)
    )


def test_gradient_of_the_norm() -> None:
    x, weight = draw((2, 3, 5), (5,))
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-5), F.rms_norm(x, (5,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda x: RMSNormFunction.apply(x, weight, 1e-5), (x.requires_grad_(),))


def prepared(base: Path, **settings) -> tuple:
    model, tokenizer = load_base(base)
    inject(model, LoraConfig(r=4, lora_alpha=16, **settings), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05, generator=generator)
    examples = tokenize_rows(tokenizer, make_rows(3), 60).examples
    return model.train(), collate(examples, model.device)


def step(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many numbers were kept for the backward pass."""
    torch.manual_seed(0)  # some families drop out by themselves
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_sum(model, *batch)
    loss.backward()
    found = {name: value.grad.clone() for name, value in trained_parameters(model).items()}
    model.zero_grad()
    return loss.detach(), found, sum(kept.values())


@pytest.mark.parametrize(
    ("family", "targets"),
    [(family, "all-linear") for family in FAMILIES]
    + [(family, targets) for family in ("gemma", "qwen3") for targets in (("q_proj", "v_proj"), ("up_proj", "k_proj"))],
)
def test_a_fused_model_has_the_loss_and_gradients_of_the_plain_one(tmp_path: Path, family: str, targets) -> None:
    model, batch = prepared(make_base(tmp_path / "base", family), target_modules=targets)
    loss, gradients, kept = step(model, batch)
    with fused_modules(model):
        fused_loss, fused_gradients, fused_kept = step(model, batch)
    torch.testing.assert_close(fused_loss, loss)
    torch.testing.assert_close(fused_gradients, gradients, atol=1e-3, rtol=1e-4)
    assert fused_kept <= kept


def test_less_is_kept_where_the_family_is_known(llama: Path) -> None:
    model, batch = prepared(llama)
    kept = step(model, batch)[2]
    with fused_modules(model):
        assert step(model, batch)[2] < 0.8 * kept


def test_everything_is_put_back(llama: Path) -> None:
    model, batch = prepared(llama)
    loss = loss_sum(model, *batch)
    with pytest.raises(RuntimeError, match="broken"), fused_modules(model):
        raise RuntimeError("broken")
    assert [module for module in model.modules() if "forward" in vars(module)] == []
    assert torch.equal(loss_sum(model, *batch), loss)


def test_without_gradients_the_plain_modules_run(llama: Path) -> None:
    model, batch = prepared(llama)
    with torch.no_grad():
        plain = loss_sum(model, *batch)
        with fused_modules(model):
            assert torch.equal(loss_sum(model, *batch), plain)


def test_what_is_more_than_a_plain_adapter_is_not_fused(llama: Path) -> None:
    """Dropout draws a mask for each layer; an adapter that is off adds nothing."""
    model, batch = prepared(llama, lora_dropout=0.5)
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    torch.manual_seed(0)
    plain = loss_sum(model, *batch)
    with fused_modules(model):
        torch.manual_seed(0)
        torch.testing.assert_close(loss_sum(model, *batch), plain)
        with adapter_disabled(model):
            off = loss_sum(model, *batch)
    with adapter_disabled(model):
        torch.testing.assert_close(off, loss_sum(model, *batch))
    assert norms
    assert not torch.isclose(off, plain)


def test_siblings_that_read_different_tensors_compute_their_own(llama: Path) -> None:
    model, _ = prepared(llama)
    attention = model.model.layers[0].self_attn
    x, other = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    expected = attention.q_proj(x), attention.k_proj(other), attention.q_proj(other), attention.v_proj(x)
    with fused_modules(model):
        found = attention.q_proj(x), attention.k_proj(other), attention.q_proj(other), attention.v_proj(x)
    torch.testing.assert_close(found, expected)
    assert len(lora_layers(model)) == 14


def test_siblings_that_fail_keep_nothing(llama: Path) -> None:
    model, _ = prepared(llama)
    attention = model.model.layers[0].self_attn
    x, wide = torch.randn(2, 3, 32), torch.randn(2, 3, 33)
    kept = weakref.ref(wide)
    with fused_modules(model):
        attention.q_proj(x)
        with pytest.raises(RuntimeError, match="shapes"):
            attention.k_proj(wide)
        del wide
        gc.collect()
        assert kept() is None
        torch.testing.assert_close(attention.v_proj(x), attention.v_proj(x))
