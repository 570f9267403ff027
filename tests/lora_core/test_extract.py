import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from lora_core.errors import BadAdapter, BadConfig, DifferentBases, KeyMismatch, ShapeMismatch
from lora_core.extract import extract
from lora_core.gate import WEIGHTS_FILE
from lora_core.keymap_torch import build_keymap
from lora_core.lowrank import Decomposition
from lora_core.merge import merge
from lora_core.shards import open_checkpoint
from tests.lora_core.adapters import make_peft_adapter
from tests.lora_core.recipes import randomize
from tests.lora_core.test_algebra import assert_equal, read_deltas
from tests.tiny import make_base


def adapter(base: Path, directory: Path, **settings) -> Path:
    return randomize(make_peft_adapter(base, directory, **settings), scale=0.3)


def change(folder: Path, **tensors) -> Path:
    """Tensors of a checkpoint in one file by another of the same name."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    return folder


def test_an_adapter_comes_back_from_what_it_was_merged_into(tmp_path, llama):
    original = adapter(llama, tmp_path / "lora", rank_pattern={"v_proj": 2}, target_modules=["q_proj", "v_proj"])
    merge(llama, original, tmp_path / "merged")
    report = extract(llama, tmp_path / "merged", tmp_path / "out", rank=4, energy=0.999999)
    assert_equal(read_deltas(llama, tmp_path / "out"), read_deltas(llama, original))
    assert {module.path.rpartition(".")[2]: module.rank for module in report.modules} == {
        "q_proj": 4,
        "v_proj": 2,
    }
    assert all(module.retained_energy > 0.999999 for module in report.modules)
    assert not report.left_out
    merge(llama, tmp_path / "out", tmp_path / "again")
    merged, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    for name, tensor in merged.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_change_of_full_rank_is_cut_to_its_best_part_and_the_report_says_so(tmp_path, llama, name):
    before = load_file(llama / "model.safetensors")
    noise = torch.randn(before[name].shape, generator=torch.Generator().manual_seed(0)) * 0.1
    merged = make_base(tmp_path / "merged")
    change(merged, **{name: before[name] + noise})
    report = extract(llama, merged, tmp_path / "out", rank=5)
    left, sigma, right = torch.linalg.svd(noise, full_matrices=False)
    found = read_deltas(llama, tmp_path / "out")
    expected = {f"base_model.model.{name.removesuffix('.weight')}": left[:, :5] * sigma[:5] @ right[:5]}
    assert_equal(found, expected)
    (module,) = report.modules
    assert module.retained_energy == pytest.approx((sigma[:5].square().sum() / sigma.square().sum()).item(), rel=1e-4)
    assert module.relative_change == pytest.approx((noise.norm() / before[name].norm()).item(), rel=1e-4)


def test_sharded_bfloat16_checkpoints_are_compared_tensor_by_tensor(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16", shards=3)
    original = adapter(base, tmp_path / "lora")
    merge(base, original, tmp_path / "merged", dtype="float32")
    extract(base, tmp_path / "merged", tmp_path / "out", rank=4)
    theirs, ours = (load_file(folder / WEIGHTS_FILE) for folder in (original, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for name in [name for name in theirs if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(ours[other] @ ours[name], 2 * theirs[other] @ theirs[name], atol=2e-5, rtol=1e-4)


def test_equal_seeds_give_equal_bytes(tmp_path, llama):
    merge(llama, adapter(llama, tmp_path / "lora"), tmp_path / "merged")
    for name in ("one", "two"):
        extract(llama, tmp_path / "merged", tmp_path / name, rank=3)
    assert (tmp_path / "one" / WEIGHTS_FILE).read_bytes() == (tmp_path / "two" / WEIGHTS_FILE).read_bytes()


def test_a_changed_norm_is_named_and_left_out_only_if_told(tmp_path, llama):
    merge(llama, adapter(llama, tmp_path / "lora"), tmp_path / "merged")
    change(tmp_path / "merged", **{"model.norm.weight": torch.full((32,), 1.1)})
    with pytest.raises(KeyMismatch, match=r"model\.norm\.weight"):
        extract(llama, tmp_path / "merged", tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    report = extract(llama, tmp_path / "merged", tmp_path / "out", rank=4, leave_out=True)
    assert report.left_out == {"model.norm.weight": pytest.approx(0.1)}


def test_a_tied_output_layer_cannot_be_extracted(tmp_path):
    base = make_base(tmp_path / "base", tie=True)
    merged = make_base(tmp_path / "merged", tie=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    change(merged, **{"model.embed_tokens.weight": embedding + 0.1})
    with pytest.raises(KeyMismatch, match="embed_tokens"):
        extract(base, merged, tmp_path / "out", rank=4)


def test_another_vocabulary_is_refused_by_name(tmp_path, llama):
    merged = make_base(tmp_path / "merged", vocab=328)
    with pytest.raises(ShapeMismatch, match="vocabulary"):
        extract(llama, merged, tmp_path / "out", rank=4)


def test_another_family_another_depth_and_the_base_itself_are_refused(tmp_path, llama):
    with pytest.raises(DifferentBases, match="mistral"):
        extract(llama, make_base(tmp_path / "mistral", "mistral"), tmp_path / "out", rank=4)
    with pytest.raises(KeyMismatch, match=r"only the base has model\.layers\.1"):
        extract(llama, make_base(tmp_path / "shallow", layers=1), tmp_path / "out", rank=4)
    with pytest.raises(BadAdapter, match="differs"):
        extract(llama, llama, tmp_path / "out", rank=4)
    with pytest.raises(BadConfig, match="rank"):
        extract(llama, llama, tmp_path / "out", rank=0)


def test_conv1d_layers_are_turned_and_need_a_key_map(tmp_path):
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    original = adapter(base, tmp_path / "lora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    keymap = build_keymap(json.loads((base / "config.json").read_text()), open_checkpoint(base).tensors())
    merge(base, original, tmp_path / "merged")
    with pytest.raises(KeyMismatch, match="key map"):
        extract(base, tmp_path / "merged", tmp_path / "out", rank=4)
    extract(base, tmp_path / "merged", tmp_path / "out", rank=4, keymap=keymap)
    assert_equal(read_deltas(base, tmp_path / "out"), read_deltas(base, original))


def test_sampling_finds_what_a_full_decomposition_finds():
    random = np.random.default_rng(0)
    matrix = (random.standard_normal((700, 12)) * 2.0 ** -np.arange(12)) @ random.standard_normal((12, 500))
    matrix = (matrix + 1e-3 * random.standard_normal(matrix.shape)).astype(np.float32)
    sampled = Decomposition.of_matrix(matrix, 8, "seed")
    left, sigma, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(sampled.sigma, sigma[:8], rtol=1e-5)
    assert sampled.energy == pytest.approx((sigma**2).sum(), rel=1e-6)
    best = ((matrix - left[:, :8] * sigma[:8] @ right[:8]) ** 2).sum()
    lora_B, lora_A = sampled.factors(8)
    assert ((matrix - lora_B @ lora_A) ** 2).sum() <= best * (1 + 1e-4)
