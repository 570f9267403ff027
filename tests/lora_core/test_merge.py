import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_core import layout
from lora_core.config import LoraConfig
from lora_core.errors import BadBase, KeyMismatch, NonFinite, ShapeMismatch
from lora_core.header import encode_header
from lora_core.merge import merge
from lora_core.plan import plan_merge
from tests.lora_core.adapters import TOKENS, logits, make_peft_adapter
from tests.lora_core.recipes import randomize
from tests.tiny import make_base, randomize_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj.weight"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def exact(base: Path, adapter: Path, scaling: float) -> dict[str, np.ndarray]:
    """W + scaling·B·A in float64, by the plain formula."""
    factors = load_file(adapter / "adapter_model.safetensors")
    result = {name: tensor.double().numpy() for name, tensor in weights(base).items()}
    for name, A in factors.items():
        if "lora_A" in name:
            B = factors[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            result[target] = result[target] + scaling * (B.double().numpy() @ A.double().numpy())
    return result


def round_once(values: np.ndarray, dtype: str) -> np.ndarray:
    """To the nearest, as bits; bfloat16 by choosing between the two float32 neighbours with zero low halves."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    low = (np.abs(values).astype(np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    low -= np.where(low.view(np.float32) > np.abs(values), 0x10000, 0).astype(np.uint32)
    high = low + np.uint32(0x10000)
    down = np.abs(values) - low.view(np.float32)
    up = high.view(np.float32) - np.abs(values)
    odd = (low >> 16) & 1
    chosen = np.where((up < down) | ((up == down) & (odd == 1)), high, low).astype(np.uint32)
    return np.copysign(chosen.view(np.float32), values).astype(ml_dtypes.bfloat16)


def same(tensor: torch.Tensor, expected: np.ndarray) -> bool:
    return torch.equal(tensor.double(), torch.from_numpy(expected.astype(np.float64)))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_every_element_is_the_exact_sum_rounded_once(tmp_path, stored, shards, dtype):
    base = make_base(tmp_path / "base", dtype=stored, shards=shards, hidden=64)
    adapter = make_peft_adapter(base, tmp_path / "adapter", target_modules=ALL, r=4, lora_alpha=6)
    merge(base, adapter, tmp_path / "out", dtype=dtype)
    reference = exact(base, adapter, 1.5)
    merged = weights(tmp_path / "out")
    assert merged.keys() == reference.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == getattr(torch, dtype or stored)
        assert same(tensor, round_once(reference[name], dtype or stored)), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 8}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"target_modules": "all-linear"},
    ],
)
def test_merged_logits_equal_those_of_peft(tmp_path, llama, settings):
    adapter = make_peft_adapter(llama, tmp_path / "adapter", scale=0.2, **settings)
    merge(llama, adapter, tmp_path / "out")
    with_adapter = logits(llama, adapter)
    assert (with_adapter - logits(llama)).abs().max() > 0.01
    torch.testing.assert_close(logits(tmp_path / "out"), with_adapter, atol=2e-5, rtol=0)


@pytest.mark.parametrize("prefix", [True, False])
def test_transposed_layers_merge_with_and_without_the_checkpoint_prefix(tmp_path, prefix):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64))
    base = tmp_path / "base"
    model.save_pretrained(base)
    if not prefix:
        path = base / "model.safetensors"
        save_file({n.removeprefix("transformer."): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    # c_proj of the attention is square: only the forward pass can tell a transposed delta
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    randomize_adapter(tmp_path / "adapter", scale=0.3)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    with_adapter = logits(base, tmp_path / "adapter")
    assert (with_adapter - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(logits(tmp_path / "out"), with_adapter, atol=2e-5, rtol=0)


@pytest.mark.parametrize("items", [64, 999, 10**9])
def test_the_result_does_not_depend_on_the_block_size(tmp_path, monkeypatch, items):
    base = make_base(tmp_path / "base", hidden=64)
    adapter = make_peft_adapter(base, tmp_path / "adapter", target_modules=ALL)
    first = merge(base, adapter, tmp_path / "one", digests=True)
    monkeypatch.setattr(layout, "BLOCK_ITEMS", items)
    monkeypatch.setattr(layout, "_MIN_ROWS", 1)
    assert merge(base, adapter, tmp_path / "two", digests=True).files == first.files


def test_untouched_tensors_and_the_header_keep_their_bytes(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_peft_adapter(base, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out")
    before, after = ((d / "model.safetensors").read_bytes() for d in (base, tmp_path / "out"))
    length = 8 + int.from_bytes(before[:8], "little")
    assert (after[:length], len(after)) == (before[:length], len(before))
    old, new = weights(base), weights(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {tensor.name for tensor in report.tensors}
    assert report.copied_tensors == len(old) - 4


def test_the_report_gives_true_hashes_sizes_and_norms(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16", shards=3)
    adapter = make_peft_adapter(base, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out", digests=True)
    assert {file.path for file in report.files} == {path.name for path in (tmp_path / "out").iterdir()}
    for file in report.files:
        content = (tmp_path / "out" / file.path).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    W, total = weights(base)[Q].double().numpy(), exact(base, adapter, 2.0)[Q]
    lost = weights(tmp_path / "out")[Q].double().numpy() - total
    norm = np.linalg.norm
    entry = next(tensor for tensor in report.tensors if tensor.name == Q)
    assert entry.relative_delta == pytest.approx(norm(total - W) / norm(W), rel=1e-6)
    assert entry.rounding_loss == pytest.approx(norm(lost) / norm(total - W), rel=1e-6)
    realised = total - W + lost
    cosine = (realised * (total - W)).sum() / norm(realised) / norm(total - W)
    assert entry.cosine == pytest.approx(cosine, abs=1e-6)
    assert entry.changed_share == np.mean(realised != 0)
    assert entry.measured_share == 1


def test_nobody_asks_and_nothing_is_hashed(tmp_path, llama):
    report = merge(llama, make_peft_adapter(llama, tmp_path / "adapter"), tmp_path / "out")
    assert {file.sha256 for file in report.files} == {""}


def test_a_large_tensor_is_measured_in_part_the_same_part_whatever_the_blocks(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", dtype="bfloat16", hidden=256, layers=1)
    adapter = make_peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    before, sums = weights(base), exact(base, adapter, 2.0)
    reports = merge(base, adapter, tmp_path / "out").tensors
    after = weights(tmp_path / "out")
    monkeypatch.setattr(layout, "BLOCK_ITEMS", 7 * 256)
    monkeypatch.setattr(layout, "_MIN_ROWS", 1)
    for report, again in zip(reports, merge(base, adapter, tmp_path / "again").tensors, strict=True):
        W, total = before[report.name].double().numpy(), sums[report.name]
        assert report.measured_share == again.measured_share == (0.25 if "down" in report.name else 0.5)
        assert report.changed_share == again.changed_share
        assert report.cosine == pytest.approx(again.cosine, rel=1e-12)
        relative_delta = np.linalg.norm(total - W) / np.linalg.norm(W)
        lost = np.linalg.norm(after[report.name].double().numpy() - total) / np.linalg.norm(total - W)
        assert report.relative_delta == pytest.approx(relative_delta, rel=0.1)
        assert report.rounding_loss == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize(("scale", "cosine"), [(0.0, 1.0), (1e-9, 0.0)])
def test_no_change_loses_nothing_and_a_tiny_one_everything(tmp_path, scale, cosine):
    base = make_base(tmp_path / "base", dtype="bfloat16")
    report = merge(base, make_peft_adapter(base, tmp_path / "adapter"), tmp_path / "out", scale=scale)
    for tensor in report.tensors:
        assert (tensor.cosine, tensor.changed_share) == (pytest.approx(cosine, abs=1e-6), 0.0)
        assert tensor.rounding_loss == pytest.approx(1 - cosine, abs=1e-6)


def test_the_index_has_the_real_size_and_the_config_the_new_dtype(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16", shards=3)
    merge(base, make_peft_adapter(base, tmp_path / "adapter"), tmp_path / "out", dtype="float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    merged = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in merged.values())
    assert index["weight_map"].keys() == merged.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118  not a dict
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_progress_ends_at_the_total(tmp_path, llama):
    seen = []
    adapter = make_peft_adapter(llama, tmp_path / "adapter")
    merge(llama, adapter, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


class Stop(Exception):
    pass


def test_an_exception_leaves_nothing_behind(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter")

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        merge(llama, adapter, tmp_path / "out", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_leaves_no_output(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter")
    program = (
        "import os, signal, sys; from pathlib import Path; from lora_core.merge import merge\n"
        "base, adapter, out = map(Path, sys.argv[1:])\n"
        "merge(base, adapter, out, on_progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))"
    )
    arguments = [sys.executable, "-c", program, llama, adapter, tmp_path / "out"]
    assert subprocess.run(arguments, env=os.environ | {"PYTHONPATH": "."}).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merge(llama, adapter, tmp_path / "out")  # what was left does not stand in the way


def test_an_existing_output_is_not_touched(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        merge(llama, adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("stored", "value"), [("float32", float("nan")), ("float16", 6e4)])
def test_nan_and_overflow_are_refused_by_the_name_of_the_tensor(tmp_path, stored, value):
    base = make_base(tmp_path / "base", dtype=stored)
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors[Q][3, 3] = value
    save_file(tensors, path, {"format": "pt"})
    adapter = make_peft_adapter(base, tmp_path / "adapter", scale=100.0)
    with pytest.raises(NonFinite, match="q_proj"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_a_nan_of_ones_alone_does_not_round_to_a_number(tmp_path, stored):
    base = make_base(tmp_path / "base", dtype=stored)
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors[Q].view(torch.int32 if stored == "float32" else torch.int16)[3, 3] = -1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFinite, match="q_proj"):
        merge(base, make_peft_adapter(base, tmp_path / "adapter"), tmp_path / "out", dtype="bfloat16")


def test_a_module_that_the_base_lacks_is_a_key_mismatch(tmp_path, llama):
    deeper = make_base(tmp_path / "deeper", layers=3)
    with pytest.raises(KeyMismatch, match=r"layers\.2"):
        plan_merge(llama, make_peft_adapter(deeper, tmp_path / "adapter"))


def test_another_width_is_a_shape_mismatch(tmp_path, llama):
    wider = make_base(tmp_path / "wider", hidden=64)
    with pytest.raises(ShapeMismatch, match="q_proj"):
        plan_merge(llama, make_peft_adapter(wider, tmp_path / "adapter"))


def test_a_path_that_fits_two_tensors_is_not_guessed(tmp_path, llama):
    base = make_base(tmp_path / "base")
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors |= {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(KeyMismatch, match="more than one"):
        plan_merge(base, make_peft_adapter(llama, tmp_path / "adapter"))


def test_a_missing_shard_is_refused(tmp_path):
    base = make_base(tmp_path / "base", shards=3)
    adapter = make_peft_adapter(base, tmp_path / "adapter")
    next(base.glob("model-00002*")).unlink()
    with pytest.raises(BadBase, match="model-00002"):
        plan_merge(base, adapter)


def test_an_output_layer_shared_with_the_embedding_gets_its_own_weights(tmp_path, llama):
    tied = make_base(tmp_path / "tied", tie=True)
    # the file also holds a copy of the base's matrix, which stays as it is
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config).save_pretrained(tmp_path / "adapter")
    adapter = randomize(tmp_path / "adapter")
    merge(tied, adapter, tmp_path / "out")
    merged = weights(tmp_path / "out")
    assert torch.equal(merged["model.embed_tokens.weight"], weights(tied)["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tied, adapter), atol=2e-5, rtol=0)


def test_an_embedding_is_not_taken_for_a_linear_layer(tmp_path, llama):
    adapter = make_peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    save_file(
        {name.replace("layers.0.self_attn.q_proj", "embed_tokens"): t for name, t in load_file(path).items()}, path
    )
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "embed_tokens"]}))
    with pytest.raises(KeyMismatch, match="embed_tokens is an embedding"):
        plan_merge(llama, adapter)


MEASURE = """
import re, sys
from pathlib import Path
from lora_core.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, adapter, out)
# not ru_maxrss: it starts at what the parent of this process had
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    def peak_kilobytes(layers: int) -> int:
        folder = tmp_path / str(layers)
        for part in ("base", "adapter"):
            (folder / part).mkdir(parents=True)
        (folder / "base" / "config.json").write_text("{}")
        write_zeros(folder / "base" / "model.safetensors", {f"l.{i}.q.weight": (1024, 1024) for i in range(layers)})
        factors = {f"base_model.model.l.{i}.q.lora_A.weight": (1, 1024) for i in range(layers)}
        factors |= {f"base_model.model.l.{i}.q.lora_B.weight": (1024, 1) for i in range(layers)}
        write_zeros(folder / "adapter" / "adapter_model.safetensors", factors)
        config = LoraConfig(r=1, target_modules=("q",)).to_peft_json()
        (folder / "adapter" / "adapter_config.json").write_bytes(config)
        arguments = [sys.executable, "-c", MEASURE, folder / "base", folder / "adapter", folder / "out"]
        done = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, check=True)
        return int(done.stdout)

    def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        head, header = encode_header([(name, "F32", shape) for name, shape in shapes.items()], {})
        path.write_bytes(head)
        os.truncate(path, header.file_bytes)

    assert peak_kilobytes(24) < peak_kilobytes(2) + 16 * 1024  # 96 MiB and 8 MiB of weights


def test_a_tied_base_merges_and_stays_tied(tmp_path):
    base = make_base(tmp_path / "base", "gemma", tie=True)
    adapter = make_peft_adapter(base, tmp_path / "adapter", scale=0.2)
    merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base, adapter), atol=2e-5, rtol=0)
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_bfloat16_logits_agree_within_the_rounding_of_weights(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_peft_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "kept")
    merge(base, adapter, tmp_path / "wide", dtype="float32")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    with torch.no_grad():
        # 2⁻⁹ relative per weight; logits here are below 4 in size
        torch.testing.assert_close(kept(TOKENS).logits, wide(TOKENS).logits, atol=4 * 2**-9, rtol=0)
