"""A merged checkpoint must say what base and adapter say; what rounding does to it is measured, not guessed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_core.canary import canary_prompts, compare
from lora_core.errors import BadBase, NotFaithful
from lora_core.faithful import Comparison, why_unfaithful
from lora_core.merge import merge
from lora_core.plan import plan_merge
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base, make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 base, a bfloat16 base, and an adapter of both; 64 columns, for 4-bit numbers."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("canary")
    base = make_base(root / "float32", hidden=64)
    make_base(root / "bfloat16", hidden=64, dtype="bfloat16")
    make_peft_adapter(base, root / "adapter", r=4, target_modules="all-linear")
    return {path.name: path for path in root.iterdir()}


def check(folders: dict[str, Path], merged: Path, *, dtype: str, base: str = "float32", scale: float = 1.0) -> str:
    found = compare(folders[base], folders["adapter"], {"original": merged}, scale=scale)
    return why_unfaithful(found, dtype) or ""


@pytest.mark.parametrize(
    ("base", "dtype"),
    [("float32", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
def test_a_merge_is_as_far_from_its_adapter_as_rounding_takes_it(folders, tmp_path, base, dtype):
    merge(folders[base], folders["adapter"], tmp_path / "out", dtype=dtype)
    found = compare(folders[base], folders["adapter"], {"original": tmp_path / "out"})
    assert why_unfaithful(found, dtype) is None
    assert found.kl < 4 * found.rounding_kl
    assert found.effect_kl > 1000 * found.kl
    assert [prompt.name for prompt in found.prompts if prompt.top1_agreement < 0.9] == []
    assert found.losses["merged_original"] == pytest.approx(found.losses["adapter_on_original"], rel=1e-3)


@pytest.mark.parametrize(("base", "dtype"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_another_scale_than_the_one_asked_for_is_not_faithful(folders, tmp_path, base, dtype):
    merge(folders[base], folders["adapter"], tmp_path / "out", dtype=dtype, scale=0.5)
    assert check(folders, tmp_path / "out", base=base, dtype=dtype, scale=0.5) == ""
    assert "does not say what base and adapter say" in check(folders, tmp_path / "out", base=base, dtype=dtype)


@pytest.mark.parametrize("damage", ["one tensor doubled", "one row exchanged", "one tensor not merged"])
def test_one_wrong_tensor_is_found(folders, tmp_path, damage):
    out = tmp_path / "out"
    merge(folders["float32"], folders["adapter"], out)
    tensors, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if damage == "one tensor doubled":
        tensors[name] *= 2
    elif damage == "one row exchanged":
        tensors[name][[0, 1]] = tensors[name][[1, 0]]
    else:
        tensors[name] = load_file(folders["float32"] / "model.safetensors")[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert "Report this" in check(folders, out, dtype="float32")


def test_a_merge_that_does_not_load_is_not_faithful(folders, tmp_path):
    out = Path(shutil.copytree(folders["float32"], tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFaithful, match="cannot be loaded"):
        check(folders, out, dtype="float32")


def test_a_base_that_does_not_load_is_another_matter(folders, tmp_path):
    with pytest.raises(BadBase):
        compare(tmp_path, folders["adapter"], {"original": folders["float32"]})


def test_a_merge_into_four_bits_is_compared_on_four_bits_and_states_the_loss_of_both(folders, tmp_path):
    base, adapter = folders["bfloat16"], folders["adapter"]
    for start in ("original", "nf4"):
        recipe = plan_merge(base, adapter, start=start).recipe
        merge(base, adapter, tmp_path / start, recipe=recipe)
    found = compare(base, adapter, {start: tmp_path / start for start in ("original", "nf4")}, start="nf4")
    assert why_unfaithful(found, "bfloat16") is None
    losses = found.losses
    assert losses.keys() == {"base", *(f"{who}_{s}" for who in ("merged", "adapter_on") for s in ("original", "nf4"))}
    for start in ("original", "nf4"):
        assert losses[f"merged_{start}"] == pytest.approx(losses[f"adapter_on_{start}"], rel=1e-3)
    assert abs(losses["merged_nf4"] - losses["merged_original"]) > 1e-6
    wrong = compare(base, adapter, {"nf4": tmp_path / "original"}, start="nf4")
    assert why_unfaithful(wrong, "bfloat16")


def test_the_prompts_are_those_of_tokenizer_and_template(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "a")
    prompts = canary_prompts(tokenizer)
    assert [prompt.name for prompt in prompts] == [
        *(f"text_{n}" for n in range(1, 5)),
        *(f"question_{n}" for n in range(1, 5)),
        "ids_1",
        "ids_2",
    ]
    assert canary_prompts(AutoTokenizer.from_pretrained(tmp_path / "a")) == prompts
    assert tokenizer.decode(prompts[4].ids).startswith("<s><|user|>\nWhat is 17")
    bare = canary_prompts(make_tokenizer(tmp_path / "b", chat_template=None))
    assert bare[:4] == prompts[:4]
    assert tokenizer.decode(bare[4].ids).startswith("What is 17")
    assert {len(prompt.ids) for prompt in prompts if not prompt.is_text} == {32}
    assert max(max(prompt.ids) for prompt in prompts) < len(tokenizer)


FAITHFUL = Comparison(prompts=(), kl=1e-6, rounding_kl=1e-6, effect_kl=1e-2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"kl": 6e-5}, None),
        ({"kl": 7e-5}, "does not say what base and adapter say"),
        ({"kl": 1e-13, "rounding_kl": 0.0}, None),
        ({"kl": 1e-11, "rounding_kl": 0.0}, "does not say"),
        ({"kl": 5e-6, "effect_kl": 1e-5}, "takes most of this adapter's effect away"),
        ({"kl": 3e-6, "effect_kl": 1e-5}, None),
        ({"kl": float("inf")}, "does not say"),
    ],
)
def test_the_verdict(change, told):
    verdict = why_unfaithful(replace(FAITHFUL, **change), "bfloat16")
    assert (verdict is None) == (told is None)
    if verdict and told:
        assert told in verdict
        assert "Merge with dtype float32" in verdict
