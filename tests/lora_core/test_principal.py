"""PiSSA and OLoRA: PEFT's start and training as the oracle; what is saved is a plain LoRA that fits the base."""

import peft
import pytest
import torch
from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from lora_core.inject import inject
from lora_core.layers import LoraLinear
from lora_core.principal import PrincipalConv1D, PrincipalLinear, as_plain
from tests.lora_core.test_dora import Net

METHODS = ("pissa", "olora")


def ours(method: str, *, kind: str = "linear", r: int = 4) -> PrincipalLinear:
    layer = PrincipalConv1D if kind == "conv1d" else PrincipalLinear
    return layer(Net(kind).layer, method=method, path="layer", r=r, scaling=1.5)


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 96).view(6, 16)


def trained(module: nn.Module, steps: int = 3) -> torch.Tensor:
    """What the module says after some steps of AdamW, which treats a factor and its negative alike."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x()).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        return module(x())


# PEFT's OLoRA takes a Conv1D's matrix as it is stored, the wrong way round.
@pytest.mark.parametrize(("method", "kind"), [("pissa", "linear"), ("pissa", "conv1d"), ("olora", "linear")])
def test_start_and_training_are_those_of_peft(method, kind):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": method}
    theirs = peft.get_peft_model(Net(kind), peft.LoraConfig(**settings))
    layer, adapted = ours(method, kind=kind), theirs.base_model.model.layer
    lora_A, lora_B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, lora_B @ lora_A)
    torch.testing.assert_close(layer.lora_A.abs(), lora_A.abs(), atol=1e-5, rtol=1e-4)
    subtracted = layer.scaling * layer.lora_B @ layer.lora_A
    residual = layer.base_layer.weight - (subtracted.T if kind == "conv1d" else subtracted)
    torch.testing.assert_close(residual, adapted.base_layer.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trained(layer), trained(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_layer_changes_nothing_and_training_never_the_base(method):
    layer = ours(method)
    before = layer.base_layer.weight.clone()
    assert not layer.has_learned()
    assert torch.equal(layer(x()), layer.base_layer(x()))
    assert (trained(layer) - layer.base_layer(x())).abs().max() > 0.1
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.has_learned()
    layer.enabled = False
    assert torch.equal(layer(x()), layer.base_layer(x()))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_sees_changes_far_below_its_own_resolution(method):
    layer = ours(method)
    with torch.no_grad():
        layer.lora_A *= 1 + 1e-4
        added = x() @ layer.delta_weight().T
        layer.base_layer.bfloat16()
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        seen = layer(x().bfloat16()).float()
    assert 0 < added.norm() < 1e-2
    assert (seen - added).norm() < 0.02 * added.norm()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_a_plain_lora_of_twice_the_rank(method, kind):
    layer = ours(method, kind=kind)
    expected = trained(layer)
    plain_kind = LoraLinear if kind == "linear" else type("Plain", (LoraLinear,), {"matrix": PrincipalConv1D.matrix})
    plain = plain_kind(layer.base_layer, path="layer", r=8, scaling=layer.scaling)
    plain.load_tensors(layer.adapter_tensors())
    torch.testing.assert_close(plain(x()), expected, atol=1e-5, rtol=1e-5)
    merged = layer.base_layer.weight + layer.delta_weight()
    with torch.no_grad():
        layer.base_layer.weight.copy_(merged)
    torch.testing.assert_close(layer.base_layer(x()), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_saved_configuration_keeps_every_scaling(use_rslora):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        rank_pattern={"a": 3},
        alpha_pattern={"b": 5},
        init_lora_weights="pissa",
    )
    plain = as_plain(config)
    for path in ("a", "b", "c"):
        assert plain.rank_for(path) == 2 * config.rank_for(path)
        assert plain.scaling_for(path) == pytest.approx(config.scaling_for(path), rel=1e-15)
    assert plain.init_lora_weights is True
    with pytest.raises(BadConfig, match="pissa"):
        config.to_peft_json()


def test_what_cannot_be_done_is_refused():
    with pytest.raises(BadConfig, match="16 principal directions"):
        ours("pissa", r=17)
    layer = ours("pissa")
    with pytest.raises(BadConfig, match="in training from principal directions"):
        layer.load_tensors(layer.adapter_tensors())


def spectrum(name: str, rows: int = 640, columns: int = 768) -> torch.Tensor:
    """A matrix with known singular values: falling as those of trained weights do, or of noise, which hardly fall."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    if name == "noise":
        return noise / columns**0.5
    U, _, Vh = torch.linalg.svd(noise, full_matrices=False)
    return U @ torch.diag(torch.arange(1, len(U) + 1) ** -0.5) @ Vh


def large(weight: torch.Tensor, *, r: int = 6, path: str = "layer", method: str = "pissa") -> PrincipalLinear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        base.weight.copy_(weight)
    return PrincipalLinear(base, method=method, path=path, r=r, scaling=2.0)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "share", "cosine"), [("trained", 0.99999, 0.9999), ("noise", 0.99, 0.5)])
def test_the_start_in_a_large_matrix_is_within_a_hair_of_its_svd(name, share, cosine, turned):
    weight = spectrum(name).T if turned else spectrum(name)
    layer = large(weight)
    with torch.no_grad():
        start = layer.scaling * layer.lora_B @ layer.lora_A
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        removed = weight.square().sum() - (weight - start).square().sum()
        assert share < removed / S[:6].square().sum() < 1.00001
        for best, factor in ((U[:, :6], layer.lora_B), (Vh[:6].T, layer.lora_A.T)):
            assert torch.linalg.svdvals(best.T @ torch.linalg.qr(factor)[0]).min() > cosine
        torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), atol=0, rtol=1e-4)
        if name == "trained":
            torch.testing.assert_close(start, U[:, :6] @ torch.diag(S[:6]) @ Vh[:6], atol=1e-4, rtol=0)


def test_the_start_is_a_matter_of_matrix_and_path_alone():
    weight = spectrum("noise")
    first, again, elsewhere = large(weight), large(weight), large(weight, path="other")
    assert torch.equal(first.lora_A, again.lora_A)
    assert torch.equal(first.lora_B, again.lora_B)
    assert not torch.equal(first.lora_A, elsewhere.lora_A)


@pytest.mark.parametrize("content", ["zeros", "one direction"])
def test_a_large_matrix_without_enough_directions_has_a_start_all_the_same(content):
    weight = torch.zeros(640, 768)
    if content == "one direction":
        weight += torch.linspace(-1, 1, 640)[:, None]
    layer = large(weight)
    with torch.no_grad():
        start = layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(start, weight, atol=1e-3, rtol=1e-4)
    assert torch.isfinite(layer.lora_A).all()


def test_oloras_start_is_the_beginning_of_the_whole_qr_decomposition():
    weight = spectrum("noise", 96, 64)
    layer = large(weight, method="olora")
    Q, R = torch.linalg.qr(weight)
    torch.testing.assert_close(layer.lora_B.detach(), Q[:, :6], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.lora_A.detach(), R[:6], atol=1e-5, rtol=1e-4)


def test_each_layer_is_told_of_as_it_is_made():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    calls = []
    config = LoraConfig(r=2, target_modules=("0", "1", "3"), init_lora_weights="pissa")
    paths = inject(model, config, seed=0, on_layer=lambda: calls.append(len(calls)))
    assert len(calls) == len(paths) == 3
