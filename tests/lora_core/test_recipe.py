"""Recipes as documents, and what a planner refuses: by name, before any arithmetic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import BadAdapter, BadConfig, BadRecipe, KeyMismatch, NonFinite, ShapeMismatch
from lora_core.peft_config import AdapterConfig
from lora_core.plan import plan_merge
from lora_core.recipe import LowRank, Recipe, TensorRecipe
from tests.lora_core.recipes import carry_out
from tests.lora_core.test_recipe_kinds import make_adapter

PATH = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight"
EMBEDDING = "base_model.model.model.embed_tokens"


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def edit(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.clear(), BadAdapter, "empty"),
        (lambda t: t.pop(A), KeyMismatch, "no lora_A"),
        (lambda t: t.pop(B), KeyMismatch, "no lora_B"),
        (lambda t: t.update({A: torch.zeros(3, 32)}), ShapeMismatch, "should be r = 4"),
        (lambda t: t.update({A: torch.zeros(128)}), ShapeMismatch, "q_proj.lora_A"),
        (lambda t: t.update({A: torch.zeros(4, 0)}), ShapeMismatch, "q_proj.lora_A"),
        (lambda t: t.update({A: torch.zeros(4, 31)}), ShapeMismatch, r"\[32, 31\]"),
        (lambda t: t.update({B: torch.zeros(32, 4, 2)}), ShapeMismatch, "q_proj.lora_B"),
        (lambda t: t.update({B: torch.zeros(32, 4, dtype=torch.int8)}), BadAdapter, "I8"),
        (lambda t: t.update({"x": torch.zeros(1)}), KeyMismatch, "x does not begin"),
        (lambda t: t.update({f"{PATH}.lora_C.weight": torch.zeros(1)}), KeyMismatch, "lora_C"),
        (lambda t: t.update({f"{PATH}.lora_A": t[A].clone()}), KeyMismatch, "twice"),
        (lambda t: t.update({f"{PATH}.lora_E": torch.zeros(4, 1)}), KeyMismatch, "does not belong"),
        (lambda t: t.update({f"{PATH}.lora_magnitude_vector": torch.zeros(32)}), KeyMismatch, "does not belong"),
        (lambda t: t.update({f"{PATH}.lora_B.bias": torch.zeros(32)}), KeyMismatch, "no tensor for .*q_proj.bias"),
        (lambda t: t.update({f"{PATH}.weight": torch.zeros(32, 32)}), KeyMismatch, "not in modules_to_save"),
        (lambda t: t.update({f"{EMBEDDING}.weight": torch.zeros(321, 32)}), ShapeMismatch, "but not of both"),
        (lambda t: t.update({f"{EMBEDDING}.weight": torch.zeros(320, 31)}), ShapeMismatch, "embed_tokens"),
        (lambda t: [t.pop(n) for n in list(t) if "q_proj" in n], KeyMismatch, "q_proj, of which"),
        (lambda t: t.update({n.replace("q_proj", "k_proj"): v.clone() for n, v in t.items()}), KeyMismatch, "k_proj"),
        (lambda t: t.update({n.replace("s.0", "s.7"): v.clone() for n, v in t.items()}), KeyMismatch, r"layers\.7"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(adapter, llama, change, error, words):
    edit(adapter, change)
    with pytest.raises(error, match=words):
        plan_merge(llama, adapter)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        *(({"init_lora_weights": name}, name) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "unheard_of"}, "unheard_of"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"use_bdlora": {"a": 1}}, "use_bdlora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "TRAINABLE_TOKENS"),
        ({"something_new": 1}, "something_new"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"bias": "some"}, "bias"),
        ({"r": 0}, "r must"),
        ({"r": True}, "r must"),
        ({"r": 2.5}, "r must"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"rank_pattern": {"layers.[01].q_proj": 2}}, "regular expression"),
        ({"alpha_pattern": {"(a|b)*c": 2}}, "regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"target_modules": ["(a+)+b"]}, "target_modules"),
        ({"target_parameters": ["gate_up_proj"]}, "target_parameters"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"trainable_token_indices": [1, 1]}, "twice"),
        ({"trainable_token_indices": [-1]}, "token ids"),
    ],
)
def test_a_setting_that_cannot_be_merged_is_refused_by_name(adapter, llama, values, words):
    configure(adapter, **values)
    with pytest.raises(BadConfig, match=words):
        plan_merge(llama, adapter)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"peft_type": "LORA", "peft_type": "LORA"}', b"{" + b" " * 2**20])
def test_a_malformed_config_is_refused(data):
    with pytest.raises(BadConfig):
        AdapterConfig.from_json(data)


def test_dora_without_magnitudes_is_refused(adapter, llama):
    configure(adapter, use_dora=True)
    with pytest.raises(KeyMismatch, match="magnitude"):
        plan_merge(llama, adapter)


def test_new_rows_must_fit_their_indices(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices=[5, 3])
    configure(adapter, trainable_token_indices=[5])
    with pytest.raises(KeyMismatch, match="trainable_token_indices"):
        plan_merge(llama, adapter)
    configure(adapter, trainable_token_indices=[5, 320])
    with pytest.raises(ShapeMismatch, match="trainable_tokens_delta"):
        plan_merge(llama, adapter)


def test_a_magnitude_of_another_length_is_refused(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    edit(adapter, lambda tensors: tensors.update({f"{PATH}.lora_magnitude_vector": torch.ones(31)}))
    with pytest.raises(ShapeMismatch, match="magnitude"):
        plan_merge(llama, adapter)


@pytest.mark.parametrize("name", [A, B])
def test_nan_in_a_factor_is_refused_when_it_is_read(adapter, llama, name):
    edit(adapter, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(NonFinite, match=r"q_proj\.lora"):
        carry_out(llama, adapter)


def test_nan_in_a_replacement_is_refused_when_it_is_read(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit(adapter, lambda tensors: tensors["base_model.model.lm_head.weight"][300:301, 3].fill_(float("inf")))
    with pytest.raises(NonFinite, match="lm_head"):
        carry_out(llama, adapter)


def test_the_recipe_does_not_depend_on_the_order_of_target_modules(adapter, llama):
    configure(adapter, target_modules=["q_proj", "v_proj"])
    first = plan_merge(llama, adapter).recipe.to_json()
    configure(adapter, target_modules=["v_proj", "q_proj"])
    assert plan_merge(llama, adapter).recipe.to_json() == first


def test_a_recipe_survives_json_with_every_field():
    term = LowRank(
        lora_A="A", lora_B="B", scaling=0.1, lora_E="E", expert=(1, 3), transposed=True, rows=(2, 5), first=7
    )
    tensor = TensorRecipe(
        base=None,
        dtype="BF16",
        shape=(9, 4),
        columns=4,
        replaced_by="R",
        new_rows="N",
        row_indices=(3, 1),
        terms=(term, LowRank(lora_A=None, lora_B="b", scaling=2.0)),
        magnitude="M",
        magnitude_of_columns=True,
    )
    quantised = TensorRecipe(base="y", dtype="F32", shape=(2, 64), columns=64, quantised="nf4")
    recipe = Recipe({"x": tensor, "y": quantised}, {"tie_word_embeddings": False})
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert tensor.adapter_tensors() == {"A", "B", "E", "R", "N", "b", "M"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format":2,"tensors":{},"config_changes":{}}',
        b'{"format":1,"tensors":{},"config_changes":{},"more":1}',
        b'{"format":1,"tensors":[],"config_changes":{}}',
        b'{"format":1,"tensors":{"x":{"base":"x"}},"config_changes":{}}',
        b'{"format":1,"tensors":{"x":{"base":"x","dtype":"F32","shape":[-1],"columns":1}},"config_changes":{}}',
        b'{"format":1,"tensors":{"x":{"base":"x","dtype":"F32","shape":[1],"columns":1,"run":1}},"config_changes":{}}',
        b'{"format":1,"tensors":{"x":{"base":"x","dtype":"F32","shape":[1],"columns":1,"terms":[1]}},"config_changes":{}}',
    ],
)
def test_a_foreign_document_is_not_a_recipe(data):
    with pytest.raises(BadRecipe):
        Recipe.from_json(data)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_A": 1},
        {"lora_B": None},
        {"lora_E": []},
        {"scaling": "2"},
        {"scaling": True},
        {"expert": [3, 3]},
        {"expert": [-1, 3]},
        {"expert": 1},
        {"rows": [2]},
        {"rows": [3, 2]},
        {"first": -1},
        {"transposed": 1},
    ],
)
def test_a_term_of_wrong_types_is_refused(values):
    term = {"lora_A": "A", "lora_B": "B", "scaling": 1.5}

    def document(term: dict[str, Any]) -> bytes:
        tensor = {"base": "x", "dtype": "F32", "shape": [4, 4], "columns": 4, "terms": [term]}
        return json.dumps({"format": 1, "tensors": {"x": tensor}, "config_changes": {}}).encode()

    Recipe.from_json(document(term))
    with pytest.raises(BadRecipe):
        Recipe.from_json(document(term | values))


@pytest.mark.parametrize(
    "values",
    [
        {"base": 1},
        {"dtype": "I8"},
        {"dtype": None},
        {"shape": 4},
        {"shape": [4, -4]},
        {"columns": 3},
        {"columns": 0},
        {"replaced_by": 1},
        {"base": None},
        {"quantised": "int8"},
        {"row_indices": ["1"]},
        {"row_indices": [1]},
        {"new_rows": "x", "row_indices": [4]},
        {"magnitude": 1},
        {"magnitude_of_columns": "x"},
    ],
)
def test_a_tensor_of_wrong_types_is_refused(values):
    tensor = {"base": "x", "dtype": "F32", "shape": [4, 4], "columns": 4}

    def document(tensor: dict[str, Any]) -> bytes:
        return json.dumps({"format": 1, "tensors": {"x": tensor}, "config_changes": {}}).encode()

    Recipe.from_json(document(tensor))
    with pytest.raises(BadRecipe):
        Recipe.from_json(document(tensor | values))
