"""AdaLoRA: PEFT's layer and RankAllocator as the oracle, step by step; ranks down to 0; files both ways."""

import peft
import pytest
import torch
from torch import nn

from lora_core.adalora import AdaLoraConv1D, AdaLoraLinear
from lora_core.adalora_config import AdaLoraConfig, read_config
from lora_core.allocator import RankAllocator
from lora_core.config import LoraConfig
from lora_core.errors import BadConfig
from tests.lora_core.test_dora import Net

SHAPES = {"a": (12, 16), "b": (16, 16), "c": (16, 8)}  # in, out
SETTINGS = {
    "init_r": 5,
    "target_r": 2,
    "lora_alpha": 9,
    "tinit": 3,
    "tfinal": 4,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.7,
    "orth_reg_weight": 0.3,
    "total_step": 16,
    "target_modules": ("a", "b", "c"),
}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (n_in, n_out) in SHAPES.items():
            self.add_module(name, nn.Linear(n_in, n_out))

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def ours() -> Toy:
    model = Toy()
    config = AdaLoraConfig(**SETTINGS)
    for name in SHAPES:
        model.set_submodule(name, AdaLoraLinear.from_config(getattr(model, name), name, config, 0))
    return model


def theirs(model: Toy) -> peft.PeftModel:
    """PEFT's, with the same start."""
    config = peft.AdaLoraConfig(**SETTINGS | {"target_modules": list(SHAPES)})
    adapted = peft.get_peft_model(Toy(), config)
    for name in SHAPES:
        layer, own = getattr(adapted.base_model.model, name), getattr(model, name)
        for factor in ("lora_A", "lora_B", "lora_E"):
            getattr(layer, factor)["default"].data.copy_(getattr(own, factor))
    return adapted


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(step))


def their_orthogonality(adapted: peft.PeftModel) -> torch.Tensor:
    """What PEFT adds to a loss; it does so only where the model returns one."""

    class Output:
        loss = torch.zeros(())

    model = adapted.base_model.model
    model.forward, kept = lambda *_, **__: Output(), model.forward
    Output.loss = torch.zeros(())
    loss = adapted.base_model.forward(None).loss
    model.forward = kept
    return loss


def test_every_step_is_that_of_peft():
    model = ours()
    adapted = theirs(model)
    allocator = RankAllocator(model, AdaLoraConfig(**SETTINGS))
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        for m in (model, adapted)
    ]
    ranks = []
    for step in range(1, 17):
        (model(batch(step)).square().sum() + 0.3 * allocator.orthogonality()).backward()
        (adapted(batch(step)).square().sum() + their_orthogonality(adapted)).backward()
        for optimizer in optimizers:
            optimizer.step()
        allocator.after_step(step)
        adapted.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        pattern = adapted.peft_config["default"].rank_pattern or {}
        for name in SHAPES:
            layer, own = getattr(adapted.base_model.model, name), getattr(model, name)
            for factor in ("lora_A", "lora_B", "lora_E"):
                torch.testing.assert_close(
                    getattr(own, factor), getattr(layer, factor)["default"], atol=1e-5, rtol=1e-4
                )
            expected = pattern.get(f"base_model.model.{name}.lora_E.default", pattern.get(f"{name}.lora_E.default"))
            assert expected is None or own.kept.tolist() == expected
        ranks.append([int(getattr(model, name).kept.sum()) for name in SHAPES])
        allocated = adapted.base_model.rankallocator
        for name, average in allocated.exp_avg_ipt.items():
            path, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            torch.testing.assert_close(getattr(model, path).importance[factor], average, atol=1e-6, rtol=1e-3)
            other = allocated.exp_avg_unc[name]
            torch.testing.assert_close(getattr(model, path).uncertainty[factor], other, atol=1e-6, rtol=1e-3)
    assert ranks[2] == [5, 5, 5]
    assert sum(ranks[3]) == 12
    assert sum(ranks[-1]) == 6
    assert ranks[11] == ranks[-1]  # the last tfinal steps keep them
    assert len({tuple(r) for r in ranks}) > 3


def test_the_budget_is_that_of_peft():
    model = ours()
    allocator, adapted = RankAllocator(model, AdaLoraConfig(**SETTINGS)), theirs(model)
    scheduled = adapted.base_model.rankallocator.budget_schedule
    assert [allocator.budget(step) for step in range(1, 17)] == [scheduled(step)[0] for step in range(1, 17)]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outputs_and_gradients_are_those_of_peft(kind):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=9, target_modules=["layer"])
    adapted = peft.get_peft_model(Net(kind), config)
    layer = (AdaLoraLinear if kind == "linear" else AdaLoraConv1D)(
        Net(kind).layer, path="layer", r=4, scaling=6 / (4 + 1e-5)
    )
    state = peft.get_peft_model_state_dict(adapted)
    state = {name: torch.randn_like(tensor) * 0.3 for name, tensor in state.items()}
    peft.set_peft_model_state_dict(adapted, state)
    layer.load_tensors({name.removeprefix("base_model.model.layer."): tensor for name, tensor in state.items()})
    results = []
    for module in (layer, adapted):
        x = torch.linspace(-1, 1, 96).view(6, 16).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    inner = adapted.base_model.model.layer
    for factor in ("lora_A", "lora_B", "lora_E"):
        torch.testing.assert_close(
            getattr(layer, factor).grad, getattr(inner, factor)["default"].grad, atol=1e-4, rtol=1e-4
        )
    merged = layer.base_layer.weight + layer.delta_weight()
    torch.testing.assert_close(merged, adapted.merge_and_unload().layer.weight, atol=1e-5, rtol=1e-4)


def test_a_fresh_layer_changes_nothing_and_its_start_depends_on_seed_and_path_only():
    layer, again = (AdaLoraLinear(Net("linear").layer, path="a", r=4, scaling=1.0, seed=3) for _ in range(2))
    x = torch.randn(7, 16)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.has_learned()
    assert torch.equal(layer.lora_A, again.lora_A)
    assert torch.equal(layer.lora_B, again.lora_B)
    other = AdaLoraLinear(Net("linear").layer, path="b", r=4, scaling=1.0, seed=3)
    assert not torch.equal(layer.lora_A, other.lora_A)
    assert abs(torch.corrcoef(torch.stack([layer.lora_A.flatten(), layer.lora_B.flatten()[:64]]))[0, 1]) < 0.5
    assert layer.lora_A.std().item() == pytest.approx(0.02, rel=0.3)


def test_pruned_triplets_are_not_saved_but_those_that_grew_back_are():
    layer = AdaLoraLinear(Net("linear").layer, path="a", r=4, scaling=1.0)
    nn.init.normal_(layer.lora_E)
    layer.kept.copy_(torch.tensor([True, False, False, True]))
    layer.prune()
    saved = layer.adapter_tensors()
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == {
        "lora_A": [2, 16],
        "lora_B": [24, 2],
        "lora_E": [2, 1],
    }
    torch.testing.assert_close(saved["lora_B"] @ (saved["lora_A"] * saved["lora_E"]), layer.delta_weight())
    layer.lora_E.data[1] = 0.5
    assert layer.saved().tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_step", 0),
        ("target_r", 13),
        ("init_r", 0),
        ("tinit", 10),
        ("deltaT", 0),
        ("beta1", 1.0),
        ("orth_reg_weight", -0.1),
        ("use_dora", True),
        ("use_rslora", True),
        ("alpha_pattern", {"q_proj": 2}),
        ("init_lora_weights", "gaussian"),
        ("kept", {"a": (True,)}),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(BadConfig, match="rank_pattern" if field == "kept" else field):
        AdaLoraConfig(**{"total_step": 10, field: value})


def test_the_configuration_goes_to_pefts_file_and_back():
    config = AdaLoraConfig(**SETTINGS, kept={"a": (True, False, False, True, False), "b": (False,) * 5})
    data = config.to_peft_json()
    assert read_config(data) == config
    assert config.rank_for("a") == 2
    assert config.rank_for("b") == 0
    assert config.rank_for("c") == 5
    assert data == read_config(data).to_peft_json()
    plain = LoraConfig(target_modules=("a",))
    assert read_config(plain.to_peft_json()) == plain
