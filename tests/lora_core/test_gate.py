import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.errors import BadAdapter, BadHeader, KeyMismatch, NonFinite, ShapeMismatch
from lora_core.gate import check_adapter
from tests.lora_core.adapters import make_peft_adapter

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return make_peft_adapter(llama, tmp_path / "adapter", rank_pattern={"v_proj": 2})


def edit(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_of_peft_passes_and_is_described(adapter):
    facts = check_adapter(adapter)
    assert facts.modules["model.layers.0.self_attn.q_proj"] == (32, 4, 32)
    assert facts.modules["model.layers.1.self_attn.v_proj"] == (16, 2, 32)
    assert len(facts.modules) == 4
    assert facts.parameter_count == 2 * (4 * 64 + 2 * 48)


def test_a_header_alone_is_refused_as_empty(adapter):
    # 40 bytes: what sharded training saves when it gathers nothing
    edit(adapter, lambda tensors: tensors.clear())
    assert (adapter / "adapter_model.safetensors").stat().st_size <= 40
    with pytest.raises(BadAdapter, match="empty"):
        check_adapter(adapter)


def zero_every_B(tensors):
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (zero_every_B, BadAdapter, "every lora_B is zero"),
        (lambda t: t.pop(A), KeyMismatch, "no lora_A"),
        (lambda t: t.pop(B), KeyMismatch, "no lora_B"),
        (lambda t: t[A].fill_(float("nan")), NonFinite, "q_proj.lora_A"),
        (lambda t: t[B].fill_(float("-inf")), NonFinite, "q_proj.lora_B"),
        (lambda t: t.update({A: torch.zeros(3, 32)}), ShapeMismatch, "should be r = 4"),
        (lambda t: t.update({A: torch.zeros(4 * 32)}), ShapeMismatch, "q_proj.lora_A"),
        (lambda t: t.update({A: torch.zeros(4, 0)}), ShapeMismatch, "q_proj.lora_A"),
        (lambda t: t.update({B: torch.zeros(32, 4, dtype=torch.int8)}), BadAdapter, "I8"),
        (lambda t: t.update({"x": torch.zeros(1)}), KeyMismatch, "x does not begin"),
        (lambda t: t.update({A.replace("q_proj", "k_proj"): t.pop(A)}), KeyMismatch, "k_proj has no lora_B"),
        (lambda t: [t.pop(n) for n in list(t) if "q_proj" in n], KeyMismatch, "q_proj, of which"),
        (lambda t: t.update({n.replace("q_proj", "z"): v.clone() for n, v in t.items()}), KeyMismatch, "z has tensors"),
    ],
)
def test_a_damaged_adapter_is_refused_with_the_reason(adapter, change, error, words):
    edit(adapter, change)
    with pytest.raises(error, match=words):
        check_adapter(adapter)


def test_one_lora_B_that_is_not_zero_is_enough(adapter):
    edit(adapter, lambda tensors: [zero_every_B(tensors), tensors[B].fill_(1)])
    check_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_a_bad_adapter(adapter, name):
    (adapter / name).unlink()
    with pytest.raises(BadAdapter, match=name):
        check_adapter(adapter)


def test_dora_without_magnitudes_is_a_key_mismatch(adapter):
    configure(adapter, use_dora=True)
    with pytest.raises(KeyMismatch, match="magnitude"):
        check_adapter(adapter)


def test_a_truncated_file_is_a_bad_header(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadHeader):
        check_adapter(adapter)


def test_rank_must_agree_with_the_config(adapter):
    configure(adapter, r=8)
    with pytest.raises(ShapeMismatch, match="r = 8"):
        check_adapter(adapter)
