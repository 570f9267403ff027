"""Where parameters lie in a checkpoint: told by transformers, or inferred from names."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_core import keymap_torch
from lora_core.architectures import ARCHITECTURES
from lora_core.errors import BadBase, BadRecipe, KeyMismatch
from lora_core.header import TensorInfo
from lora_core.keymap import Keymap, Place
from lora_core.keymap_torch import build_keymap
from lora_core.plan import plan_merge
from lora_core.shards import open_checkpoint
from tests.lora_core.recipes import carry_out, merge_to, read_weights
from tests.lora_core.test_recipe_kinds import (
    assert_merged,
    gpt2,  # noqa: F401  a fixture
    make_adapter,
    peft_model,
    without_prefix,
)
from tests.tiny import FAMILIES, make_base

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss", "minimax")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def make_moe(directory: Path, family: str, **settings: Any) -> Path:
    """A random model with three experts."""
    given = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 3,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # the families' own start leaves experts almost silent
    model.save_pretrained(directory)
    return directory


def keymap_of(base: Path) -> Keymap:
    tensors = open_checkpoint(base).tensors()
    keymap = build_keymap(json.loads((base / "config.json").read_bytes()), tensors)
    assert Keymap.from_json(keymap.to_json()) == keymap
    return keymap


def loaded_through(keymap: Keymap, base: Path) -> dict[str, np.ndarray]:
    """Parameters put together from the checkpoint as the key map says."""
    tensors = {name: tensor.numpy() for name, tensor in read_weights(base).items()}
    parameters = {}
    for name, places in keymap.places.items():
        parameters[name] = np.full(keymap.shapes[name], np.nan, np.float32)
        for place in places:
            part = parameters[name] if place.expert is None else parameters[name][place.expert]
            part = part[slice(*place.rows)] if place.rows else part
            tensor = tensors[place.tensor].T if place.transposed else tensors[place.tensor]
            part[...] = tensor[place.first : place.first + len(part)]
    return parameters


@pytest.mark.parametrize("family", sorted({*FAMILIES, *MOE}))
def test_parameters_lie_where_transformers_finds_them(tmp_path, family):
    base = make_moe(tmp_path / "base", family) if family in MOE else make_base(tmp_path / "base", family)
    keymap = keymap_of(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    found = loaded_through(keymap, base)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert np.array_equal(found[name], tensor.numpy()), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe", "granitemoe"])
@pytest.mark.parametrize("targets", [[GATE_UP], [DOWN], [GATE_UP, DOWN]])
def test_factors_of_experts_merge_into_what_the_checkpoint_holds(tmp_path, family, targets):
    base = make_moe(tmp_path / "base", family)
    targets = [target.replace("mlp", "block_sparse_moe") if family == "granitemoe" else target for target in targets]
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=targets,
        alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 9},
    )
    assert_merged(base, adapter, tmp_path / "out", keymap=keymap_of(base))


def test_factors_of_experts_stored_as_in_out_merge(tmp_path):
    base = make_moe(tmp_path / "base", "gpt_oss")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=[GATE_UP, DOWN])
    assert_merged(base, adapter, tmp_path / "out", keymap=keymap_of(base))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("targets", [[GATE_UP], [GATE_UP, DOWN]])
def test_factors_of_experts_written_before_peft_019_merge(tmp_path, monkeypatch, square, targets):
    # PEFT took every parameter of experts for (experts, in, out) then; now it does so if the module says so. With a
    # square matrix only the version in the config tells which it was.
    base = make_moe(tmp_path / "base", "mixtral", intermediate_size=8 if square else 24)
    keymap = keymap_of(base)
    always = property(lambda module: True, lambda module, value: None)  # over what each instance sets
    monkeypatch.setattr(MixtralExperts, "is_transposed", always, raising=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=targets)
    with torch.no_grad():
        expected = peft_model(base, adapter).merge_and_unload().state_dict()
    configure(adapter, peft_version="0.18.1")
    out = merge_to(base, adapter, tmp_path / "out", keymap=keymap)
    merged = loaded_through(keymap, out)
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor.numpy(), atol=1e-5)


def test_an_adapter_that_names_modules_as_the_checkpoint_does_merges(tmp_path):
    # before transformers 5 each expert was a module of its own
    base = make_moe(tmp_path / "base", "mixtral")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for expert, (name, rows, columns) in product(range(3), [("w1", 24, 16), ("w2", 16, 24), ("w3", 24, 16)]):
        for layer in range(2):
            path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    save_file(tensors, adapter / "adapter_model.safetensors")
    configure(adapter, target_modules=["q_proj", "w1", "w2", "w3"])
    assert_merged(base, adapter, tmp_path / "out", keymap=keymap_of(base))
    assert_merged(base, adapter, tmp_path / "out without a key map")


def configure(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_experts_need_a_key_map(tmp_path):
    base = make_moe(tmp_path / "base", "granitemoe")
    targets = [GATE_UP.replace("mlp", "block_sparse_moe")]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets)
    with pytest.raises(KeyMismatch):
        plan_merge(base, adapter)


@pytest.mark.parametrize("family", [family for family in FAMILIES if ARCHITECTURES[family].literal_names])
@pytest.mark.parametrize("tie", [False, True])
def test_the_inferred_key_map_gives_the_same_recipe(tmp_path, family, tie):
    base = make_base(tmp_path / "base", family, tie=tie, tokenizer=False)
    last = "c_proj" if family == "starcoder2" else "down_proj"
    targets = ["qkv_proj" if family == "phi3" else "q_proj", last, "lm_head", "embed_tokens"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets)
    recipe = plan_merge(base, adapter).recipe
    assert recipe == plan_merge(base, adapter, keymap=keymap_of(base)).recipe
    assert len(recipe.tensors) == 6
    assert ("tie_word_embeddings" in recipe.config_changes) is tie


@pytest.mark.parametrize("prefix", [True, False])
def test_the_inferred_key_map_of_gpt2_gives_the_same_recipe(tmp_path, gpt2, prefix):  # noqa: F811  a fixture
    base = gpt2 if prefix else without_prefix(gpt2, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "wte"])
    recipe = plan_merge(base, adapter).recipe
    assert recipe == plan_merge(base, adapter, keymap=keymap_of(base)).recipe
    assert recipe.tensors["lm_head.weight"].base == ("transformer." if prefix else "") + "wte.weight"


def test_parameters_that_lie_below_each_other_in_one_tensor_merge(tmp_path, llama):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    _, expected = carry_out(llama, adapter)
    base, keymap = fused(llama, tmp_path / "base")
    _, merged = carry_out(base, adapter, keymap=keymap)
    for layer in range(2):
        parts = [expected[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        np.testing.assert_allclose(merged[f"model.layers.{layer}.qkv"], np.concatenate(parts), rtol=1e-12)


def test_what_is_stored_in_parts_takes_only_factors(tmp_path, llama):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], use_dora=True)
    base, keymap = fused(llama, tmp_path / "base")
    with pytest.raises(KeyMismatch, match="in parts"):
        plan_merge(base, adapter, keymap=keymap)


def fused(base: Path, directory: Path) -> tuple[Path, Keymap]:
    """The base with q, k and v of each layer in one tensor."""
    tensors, keymap = read_weights(base), keymap_of(base)
    places = dict(keymap.places)
    for layer in range(2):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkv"]
        parts = [tensors.pop(name) for name in names]
        tensors[f"model.layers.{layer}.qkv"] = torch.cat(parts)
        for name, part, first in zip(names, parts, (0, 32, 48), strict=True):
            places[name] = (Place(tensor=f"model.layers.{layer}.qkv", rows=(0, len(part)), first=first),)
    directory.mkdir()
    shutil.copy(base / "config.json", directory)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory, replace(keymap, places=places)


class Doubled(ConversionOps):
    def convert(self, input_dict: Any, **kwargs: Any) -> Any:
        return input_dict


@pytest.mark.parametrize(
    ("operations", "sources", "targets", "places"),
    [
        ([Chunk(0)], ["b.weight"], ["q.weight", "k.weight"], [("q", 0, 2, 0), ("k", 0, 2, 2)]),
        ([Split(0)], ["b.weight"], ["q.weight", "k.weight"], [("q", 0, 2, 0), ("k", 0, 2, 2)]),
        ([Concatenate(0)], ["y.weight", "x.weight"], ["q.weight"], [("y", 0, 1, 0), ("x", 1, 2, 0)]),
        ([Transpose(0, 1)], ["t.weight"], ["q.weight"], "transposed"),
        ([Transpose(0, 1, check_dims=True)], ["s.weight"], ["q.weight"], "whole"),
        ([Doubled()], ["s.weight"], ["q.weight"], None),
        ([Chunk(0), PermuteForRope()], ["b.weight"], ["q.weight", "k.weight"], None),
    ],
)
def test_conversions_are_followed_or_declared_opaque(operations, sources, targets, places):
    shapes = {"q.weight": (2, 3), "k.weight": (2, 3)}
    stored = {"b.weight": (4, 3), "y.weight": (1, 3), "x.weight": (1, 3), "t.weight": (3, 2), "s.weight": (2, 3)}
    tensors = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in stored.items()}
    converter = WeightConverter(sources, targets, operations)
    given = [(source, source) for source in reversed(sources)]
    found = keymap_torch._converted("q.weight", converter, given, shapes, tensors)
    if places is None:
        assert found is None
    elif isinstance(places, str):
        assert found == {"q.weight": (Place(tensor=sources[0], transposed=places == "transposed"),)}
    else:
        flat = [(place, name) for name, parts in found.items() for place in parts]
        if len(sources) == 1:
            wanted = [(Place(tensor="b.weight", rows=(a, b), first=c), f"{name}.weight") for name, a, b, c in places]
        else:
            wanted = [(Place(tensor=f"{name}.weight", rows=(a, b)), "q.weight") for name, a, b, _ in places]
        assert flat == wanted


def test_an_opaque_parameter_is_refused_with_the_conversion_named(tmp_path, llama):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    keymap = keymap_of(llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    places = {parameter: place for parameter, place in keymap.places.items() if parameter != name}
    with pytest.raises(KeyMismatch, match="PermuteForRope"):
        plan_merge(llama, adapter, keymap=replace(keymap, places=places, opaque={name: "PermuteForRope"}))


def test_a_transposed_place_turns_the_product(tmp_path, llama):
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["down_proj"])
    name = "model.layers.0.mlp.down_proj.weight"
    _, expected = carry_out(llama, adapter)
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tensors = read_weights(base)
    save_file(tensors | {name: tensors[name].T.contiguous()}, base / "model.safetensors", {"format": "pt"})
    keymap = keymap_of(llama)
    places = {**keymap.places, name: (Place(tensor=name, transposed=True),)}
    _, merged = carry_out(base, adapter, keymap=replace(keymap, places=places))
    np.testing.assert_allclose(merged[name].T, expected[name], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, tensors: config.update(hidden_size=64), "has shape"),
        (lambda config, tensors: config.update(model_type="no_such_model"), "cannot make a model"),
        (lambda config, tensors: tensors.pop("model.norm.weight"), "nothing for model.norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_has_no_key_map(llama, change, words):
    config, tensors = json.loads((llama / "config.json").read_bytes()), open_checkpoint(llama).tensors()
    change(config, tensors)
    with pytest.raises(BadBase, match=words):
        build_keymap(config, tensors)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format":2}', b'{"format":1,"places":[]}', b"\xff"])
def test_a_foreign_document_is_not_a_key_map(data):
    with pytest.raises(BadRecipe):
        Keymap.from_json(data)
