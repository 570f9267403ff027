"""Merged checkpoints read in pieces, written by other means, cut differently: always the same numbers."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_core import layout
from lora_core import merge as merging
from lora_core.errors import BadBase, BadRecipe, DigestMismatch, NonFinite
from lora_core.floats import DTYPE_NAMES
from lora_core.merge import merge
from lora_core.merged import MergedCheckpoint
from lora_core.plan import plan_merge
from lora_core.recipe import Recipe, TensorRecipe
from lora_core.sources import LocalFiles
from tests.lora_core.adapters import logits, make_peft_adapter
from tests.lora_core.recipes import carry_out, randomize, read_weights
from tests.tiny import make_base

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def open_merged(base: Path, adapter: Path, **options: Any) -> MergedCheckpoint:
    return MergedCheckpoint(LocalFiles(base), LocalFiles(adapter), plan_merge(base, adapter).recipe, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read(merged: MergedCheckpoint, path: str, start: int, end: int) -> bytes:
    return b"".join(part.tobytes() for part in merged.read(path, start, end))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, Path]:
    """A bfloat16 base in three shards and an adapter with DoRA, an own output layer and most linear layers."""
    folder = tmp_path_factory.mktemp("sharded")
    base = make_base(folder / "base", dtype="bfloat16", shards=3, hidden=64, tie=True)
    config = peft.LoraConfig(r=4, target_modules=[*ALL, "lm_head"], use_dora=True)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
    return base, randomize(folder / "adapter")


@pytest.fixture(scope="module")
def whole(sharded, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Its merged files, by dtype and name; each tensor of this size is one block."""
    result = {}
    for dtype in ("base", "float32", "float16"):
        out = tmp_path_factory.mktemp("whole") / dtype
        merge(*sharded, out, dtype=None if dtype == "base" else dtype)
        result[dtype] = contents(out)
    return result


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_is_that_part_of_the_whole_file(sharded, whole, monkeypatch, data):
    monkeypatch.setattr(layout, "BLOCK_ITEMS", 64 * data.draw(st.sampled_from([64, 100, 4096])))
    dtype = data.draw(st.sampled_from(sorted(whole)))
    merged = open_merged(*sharded, dtype=DTYPE_NAMES.get(dtype))
    files = whole[dtype]
    assert {path: file.size for path, file in merged.files.items()} == {name: len(b) for name, b in files.items()}
    path = data.draw(st.sampled_from(sorted(files)))
    start = data.draw(st.integers(0, len(files[path])))
    end = data.draw(st.integers(start, len(files[path])))
    assert read(merged, path, start, end) == files[path][start:end]


@pytest.mark.parametrize("rows", [64, 1000, 4096])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_and_threads_do_not_change_a_byte(sharded, whole, tmp_path, monkeypatch, rows, threads):
    monkeypatch.setattr(layout, "BLOCK_ITEMS", rows * 64)
    monkeypatch.setattr(merging, "_THREADS", threads)
    merge(*sharded, tmp_path / "out")
    assert contents(tmp_path / "out") == whole["base"]


PROGRAM = """
import sys
from pathlib import Path
from lora_core.merge import merge
merge(*map(Path, sys.argv[1:]))
"""


@pytest.mark.parametrize("variables", [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "OPENBLAS_NUM_THREADS": "1"}])
def test_another_process_writes_the_same_bytes(sharded, whole, tmp_path, variables):
    environment = os.environ | {"PYTHONPATH": "."} | variables
    subprocess.run([sys.executable, "-c", PROGRAM, *sharded, tmp_path / "out"], env=environment, check=True)
    assert contents(tmp_path / "out") == whole["base"]


@pytest.mark.parametrize("kernel", ["Haswell", "SkylakeX", "Nehalem"])
def test_the_instructions_of_the_machine_do_not_change_a_byte(sharded, whole, tmp_path, kernel):
    if kernel == "SkylakeX" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        kernel = "Sandybridge"
    environment = os.environ | {"PYTHONPATH": ".", "OPENBLAS_CORETYPE": kernel}
    subprocess.run([sys.executable, "-c", PROGRAM, *sharded, tmp_path / "out"], env=environment, check=True)
    assert contents(tmp_path / "out") == whole["base"]


@pytest.mark.parametrize("size", [1, 40_000, 10**9])
def test_new_shards_hold_the_same_tensors(sharded, whole, tmp_path, size):
    merge(*sharded, tmp_path / "same")
    report = merge(*sharded, tmp_path / "out", shard_size=size)
    tensors = read_weights(tmp_path / "same")
    again = read_weights(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    shards = sorted(file.path for file in report.files if file.path.endswith(".safetensors"))
    if size == 10**9:
        assert shards == ["model.safetensors"]
        assert not (tmp_path / "out" / INDEX).exists()
        return
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == held.keys()
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= size


def test_a_sharded_checkpoint_that_is_cut_anew_loads(sharded, tmp_path):
    merge(*sharded, tmp_path / "out", shard_size=100_000)
    merge(*sharded, tmp_path / "same")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "same"))


def test_the_scale_multiplies_the_change(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter", lora_alpha=8)
    half = make_peft_adapter(llama, tmp_path / "half", lora_alpha=4)
    merge(llama, adapter, tmp_path / "scaled", scale=0.5)
    merge(llama, half, tmp_path / "expected")
    assert contents(tmp_path / "scaled") == contents(tmp_path / "expected")
    merge(llama, adapter, tmp_path / "none", scale=0.0)
    base = read_weights(llama)
    assert all(torch.equal(tensor, base[name]) for name, tensor in read_weights(tmp_path / "none").items())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ({"target_modules": ALL, "use_dora": True}, "proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 17]}}, "embed_tokens"),
    ],
)
def test_a_scale_is_refused_by_the_name_of_what_is_not_only_added_to(tmp_path, llama, kind, name):
    model = AutoModelForCausalLM.from_pretrained(llama)
    peft.get_peft_model(model, peft.LoraConfig(r=4, **kind)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadRecipe, match=rf"{name}.*0\.5"):
        open_merged(llama, tmp_path / "adapter", scale=0.5)
    open_merged(llama, tmp_path / "adapter", scale=1.0)


KINDS: list[dict[str, Any]] = [
    {"target_modules": ALL, "use_dora": True},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 17]}},
]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_recipe_rounded_once(tmp_path, kind, tie):
    base = make_base(tmp_path / "base", tie=tie)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=4, **kind)).save_pretrained(tmp_path / "adapter")
    randomize(tmp_path / "adapter")
    plan, expected = carry_out(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_weights(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].astype(np.float32), name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.items() >= dict(plan.recipe.config_changes).items()


def test_peft_agrees_but_for_what_its_float32_sums_round(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16", hidden=256, layers=4)
    adapter = make_peft_adapter(base, tmp_path / "adapter", target_modules=ALL, r=16, scale=0.02)
    merge(base, adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "peft")
    ours, theirs, before = (read_weights(folder) for folder in (tmp_path / "out", tmp_path / "peft", base))
    assert ours.keys() == theirs.keys()
    different = total = 0
    for name, tensor in ours.items():
        steps = (tensor.view(torch.int16).int() - theirs[name].view(torch.int16).int()).abs()
        # where W and the change cancel to nearly nothing, PEFT's float32 leaves the error of the summands
        cancelled = (tensor.float() - theirs[name].float()).abs() <= 2**-22 * before[name].float().abs()
        assert ((steps <= 1) | cancelled).all(), name
        different, total = different + int((steps > 0).sum()), total + steps.numel()
    assert total > 10**6
    assert different <= 100e-6 * total


def test_a_wrong_digest_leaves_no_output(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter")
    good = {file.path: file.sha256 for file in merge(llama, adapter, tmp_path / "out", digests=True).files}
    merge(llama, adapter, tmp_path / "again", expected=good)
    bad = good | {"model.safetensors": hashlib.sha256(b"").hexdigest()}
    with pytest.raises(DigestMismatch, match=r"model\.safetensors"):
        merge(llama, adapter, tmp_path / "third", expected=bad)
    with pytest.raises(DigestMismatch, match=r"other\.json"):
        merge(llama, adapter, tmp_path / "third", expected=good | {"other.json": "0"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "again", "out"]


def test_a_range_beyond_the_file_is_refused(sharded):
    merged = open_merged(*sharded)
    size = merged.files["config.json"].size
    for start, end in [(0, size + 1), (-1, 2), (5, 4)]:
        with pytest.raises(ValueError, match=f"{size} bytes"):
            list(merged.read("config.json", start, end))


def test_a_range_with_nan_fails_and_names_the_tensor(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter", scale=1e25)
    merged = open_merged(llama, adapter)
    with pytest.raises(NonFinite, match="q_proj"):
        list(merged.read("model.safetensors", 0, merged.files["model.safetensors"].size))


def test_a_recipe_for_another_base_is_refused(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter")
    plan = plan_merge(llama, adapter)
    for shards in (BadRecipe, BadBase):
        base = tmp_path / shards.__name__
        base.mkdir()
        for path in llama.iterdir():
            (base / path.name).write_bytes(path.read_bytes())
    (tmp_path / "BadBase" / "model.safetensors").unlink()
    with pytest.raises(BadBase, match=r"lacks model\.safetensors"):
        merge(tmp_path / "BadBase", adapter, tmp_path / "out", recipe=plan.recipe)
    strange = Recipe({"x.weight": TensorRecipe(base="y.weight", dtype="F32", shape=(2, 2), columns=2)})
    with pytest.raises(BadRecipe, match=r"y\.weight"):
        merge(llama, adapter, tmp_path / "out", recipe=strange)
    name, tensor = next(iter(plan.recipe.tensors.items()))
    cut = Recipe({name: TensorRecipe(base=name, dtype=tensor.dtype, shape=(2, 2), columns=2, terms=tensor.terms)})
    with pytest.raises(BadRecipe, match="size"):
        merge(llama, adapter, tmp_path / "out", recipe=cut)
