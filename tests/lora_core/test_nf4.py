"""NF4 against bitsandbytes, by digests of what it returned, and merges into the W0 that a QLoRA training saw."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_core import nf4
from lora_core.errors import KeyMismatch
from lora_core.keymap_torch import build_keymap
from lora_core.merge import merge
from lora_core.plan import plan_merge
from lora_core.shards import open_checkpoint
from tests.lora_core.recipes import carry_out, logits_of, read_weights
from tests.lora_core.test_keymap import make_moe
from tests.lora_core.test_recipe_kinds import gpt2, make_adapter, peft_logits  # noqa: F401  a fixture
from tests.tiny import make_base

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(dtype: str) -> np.ndarray:
    """(64, 1024) numbers, exact in float32, rounded to `dtype`; blocks differ in size by up to 97 times."""
    n = np.arange(64 * 1024)
    values = ((n * 7919) % 10007 - 5003) * ((n // 64 * 31) % 97 + 1) / 2.0**24
    return nf4.to_dtype(values.astype(np.float32).reshape(64, 1024), dtype)


# SHA-256 of bitsandbytes 0.50.2's float32 bytes on a CPU, for `weights` in that dtype. In float16 one of its 1024
# doubly quantised maxima is the second nearest level: its CPU code looks levels up by a rounded number.
@pytest.mark.parametrize(
    ("dtype", "double", "digest"),
    [
        ("F32", False, "ca7932bb081dd8b4c2990527716308b40385e518ebc8edc3ab2785e8c7fb8aea"),
        ("BF16", False, "19450e7201c23c8a823c7904b543ef17c3fd63d5515bcd940b5ffd761063f9b9"),
        ("F16", False, "18cea25f925934f45e52917a435e5643b36fa5e71cf3968b202a6df895e3cceb"),
        ("F32", True, "60e467539df44ec34564c8e0fa7a888ee701ecb920ed941dd7bc7f94c66f713b"),
        ("BF16", True, "68159191c8b6f302319a7f3ddf1dc75908a57deaa1fd0b44da5e3189e89821bb"),
    ],
)
def test_the_round_trip_is_that_of_bitsandbytes_to_the_bit(dtype, double, digest):
    values = weights(dtype).astype(np.float64)
    maxima = nf4.block_maxima(values)
    left = nf4.round_trip(values, maxima, nf4.stored_maxima(maxima) if double else maxima)
    assert hashlib.sha256(nf4.to_dtype(left, dtype).tobytes()).hexdigest() == digest


def test_a_block_of_levels_survives():
    values = np.tile(nf4.LEVELS, 8)[None].astype(np.float64) * 3
    maxima = nf4.block_maxima(values)
    assert np.array_equal(nf4.round_trip(values, maxima, maxima), values.astype(np.float32))


def test_a_block_of_zeros_stays_zero():
    values = np.zeros((2, 64))
    maxima = nf4.block_maxima(values)
    assert not nf4.round_trip(values, maxima, maxima).any()


def quantised(base: Path, directory: Path, dtype: str = "F32") -> Path:
    """The base with every linear layer but the output layer as 4 bits leave it."""
    shutil.copytree(base, directory)
    tensors = read_weights(base)
    for name, tensor in tensors.items():
        if name.split(".")[-2] in LINEAR:
            values = tensor.double().numpy()
            maxima = nf4.block_maxima(values)
            left = nf4.to_dtype(nf4.round_trip(values, maxima, nf4.stored_maxima(maxima)), dtype)
            tensors[name] = torch.from_numpy(left).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("with_keymap", [False, True])
def test_a_merge_into_four_bits_says_what_peft_says_on_them(tmp_path, dora, with_keymap):
    base = make_base(tmp_path / "base", hidden=64, tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=dora)
    keymap = keymap_of(base) if with_keymap else None
    recipe = plan_merge(base, adapter, keymap=keymap, start="nf4").recipe
    assert {name.split(".")[-2] for name in recipe.tensors} == set(LINEAR)
    merge(base, adapter, tmp_path / "out", recipe=recipe)
    expected = peft_logits(quantised(base, tmp_path / "quantised"), adapter)
    assert (expected - peft_logits(base, adapter)).abs().max() > 0.01
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, atol=3e-5, rtol=1e-5)


def test_four_bits_are_read_back_in_the_dtype_of_the_base(tmp_path):
    base = make_base(tmp_path / "base", hidden=64, dtype="bfloat16", tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    _, expected = carry_out(quantised(base, tmp_path / "quantised", "BF16"), adapter)
    _, merged = carry_out(base, adapter, start="nf4")
    for name, values in expected.items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-12, atol=0)


def test_experts_are_not_linear_layers_and_stay_whole(tmp_path):
    base = make_moe(tmp_path / "base", "mixtral", hidden_size=64, head_dim=32)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    recipe = plan_merge(base, adapter, keymap=keymap_of(base), start="nf4").recipe
    assert {name.split(".")[-2] for name in recipe.tensors} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_what_four_bits_leave_must_be_known(tmp_path, llama, gpt2):  # noqa: F811  a fixture
    adapter = make_adapter(gpt2, tmp_path / "a", target_modules=["c_attn"])
    with pytest.raises(KeyMismatch, match="key map"):
        plan_merge(gpt2, adapter, start="nf4")
    with pytest.raises(KeyMismatch, match="not stored as it is computed with"):
        plan_merge(gpt2, adapter, keymap=keymap_of(gpt2), start="nf4")
    with pytest.raises(KeyMismatch, match="multiple of 64"):  # 32 columns
        plan_merge(llama, make_adapter(llama, tmp_path / "b", target_modules=["q_proj"]), start="nf4")


def keymap_of(base: Path):
    return build_keymap(json.loads((base / "config.json").read_bytes()), open_checkpoint(base).tensors())
