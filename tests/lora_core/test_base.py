import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from lora_core.base import check_base, is_base_file
from lora_core.errors import BadBase, LoraError
from lora_core.model import load_base
from tests.tiny import FAMILIES, make_base, make_tokenizer


def configure(base: Path, name: str = "config.json", **values) -> None:
    path = base / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_facts_agree_with_the_model_that_transformers_builds(tmp_path, family, shards):
    base = make_base(tmp_path / "base", family, shards=shards, dtype="bfloat16")
    facts = check_base(base)
    model, _ = load_base(base)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert facts.linear_modules == {
        name: tuple(m.weight.shape)[:: -1 if isinstance(m, Conv1D) else 1] for name, m in layers
    }
    assert facts.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.architecture, facts.dtype, facts.tied) == (family, "bfloat16", False)
    stacked = {name: tuple(p.shape) for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
    assert facts.expert_parameters == stacked


def test_a_tied_base_has_no_output_layer_of_its_own(tmp_path):
    facts = check_base(make_base(tmp_path / "base", "gemma", tie=True))
    assert facts.tied
    assert "lm_head" not in facts.linear_modules


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "bloom"}, "'bloom' is not supported"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"architectures": ["EvilModel"]}, "LlamaForCausalLM"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"nested": {"deep": [{"auto_map": {"a": "b"}}]}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"_attn_implementation": "org/kernel"}, "_attn_implementation"),
        ({"hidden_act": "silu\n"}, "hidden_act"),
        ({"x": [["../../etc/passwd"]]}, "sets x"),
        ({"vocab_size": 5}, "embed_tokens"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(tmp_path, values, words):
    base = make_base(tmp_path / "base")
    configure(base, **values)
    with pytest.raises(BadBase, match=words):
        check_base(base)


def test_a_tokenizer_that_names_code_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    configure(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    with pytest.raises(BadBase, match="auto_map"):
        check_base(base)


@pytest.mark.parametrize(
    "name", ["modeling_evil.py", "pytorch_model.bin", "extra.safetensors", ".hidden", "tokenizer.pkl"]
)
def test_a_file_that_does_not_belong_is_refused(tmp_path, name):
    base = make_base(tmp_path / "base")
    (base / name).write_bytes(b"")
    with pytest.raises(BadBase, match=name):
        check_base(base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    base = make_base(tmp_path / "base")
    (base / name).unlink()
    with pytest.raises(BadBase, match=name):
        check_base(base)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    base = make_base(tmp_path / "base", shards=3)
    path = base / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(BadBase, match="plain"):
        check_base(base)


def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path):
    base = make_base(tmp_path / "base", shards=3)
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(BadBase, match="norm"):
        check_base(base)


def test_quantised_weights_are_refused(tmp_path):
    base = make_base(tmp_path / "base")
    path = base / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.scale": torch.zeros(3, dtype=torch.int8)}, path)
    with pytest.raises(BadBase, match="I8"):
        check_base(base)


def test_a_checkpoint_without_one_of_its_tensors_does_not_load(tmp_path):
    base = make_base(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadBase, match="up_proj"):
        load_base(base)


def test_a_tokenizer_with_tokens_the_model_lacks_does_not_load(tmp_path):
    base = make_base(tmp_path / "base", vocab=300, tokenizer=False)
    make_tokenizer(base, vocab=310)
    with pytest.raises(BadBase, match="more tokens"):
        load_base(base)


def test_auto_dtype_keeps_float32_weights_in_float32(llama):
    model, _ = load_base(llama)
    assert model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "module",
    ["architectures", "base", "config", "errors", "floats", "gate", "header", "merge", "plan", "rows", "shards"],
)
def test_the_formats_are_used_without_torch(module):
    program = (
        f"import sys, lora_core.{module}; sys.exit(bool({{'torch', 'transformers', 'pydantic'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def test_base_files_are_known_by_name():
    assert is_base_file("model-00001-of-00002.safetensors")
    assert not is_base_file("../model.safetensors")
    assert issubclass(BadBase, LoraError)
