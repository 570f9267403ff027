import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_core.adapter import save_adapter
from lora_core.architectures import ARCHITECTURES
from lora_core.config import LoraConfig
from lora_core.data import tokenize_rows
from lora_core.gate import check_adapter
from lora_core.inject import inject
from lora_core.merge import merge
from lora_core.model import load_base
from lora_core.train import TrainConfig, train
from tests.lora_core.adapters import TOKENS, logits
from tests.tiny import ENCODERS, FAMILIES, make_base, make_rows


def test_every_supported_family_is_tested():
    kinds = {"decoder": FAMILIES, "encoder": tuple(ENCODERS), "encoder-decoder": ("t5",)}
    assert {(family, kind) for kind, families in kinds.items() for family in families} == {
        (family, architecture.kind) for family, architecture in ARCHITECTURES.items()
    }


@pytest.mark.parametrize(
    ("family", "tie"), [(family, False) for family in FAMILIES] + [("gemma", True), ("llama", True)]
)
def test_trained_saved_loaded_and_merged_models_say_the_same(tmp_path, family, tie):
    base = make_base(tmp_path / "base", family, tie=tie, shards=2)
    model, tokenizer = load_base(base)
    config = LoraConfig(r=4, lora_alpha=16)
    inject(model, config, 0)
    examples = tokenize_rows(tokenizer, make_rows(16), 64).examples
    train(model, examples, TrainConfig(n_epochs=2, learning_rate=1e-2))
    save_adapter(model, config, tmp_path / "adapter")
    check_adapter(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        ours = model(TOKENS).logits
    assert (ours - logits(base)).abs().max() > 0.01
    assert torch.equal(logits(base, tmp_path / "adapter"), ours)
    torch.testing.assert_close(logits(tmp_path / "merged"), ours, atol=1e-5, rtol=0)


def test_the_merge_is_that_of_peft_up_to_its_float32_sums(tmp_path, llama):
    model, _ = load_base(llama)
    config = LoraConfig(r=4, lora_alpha=16, use_rslora=True)
    inject(model, config, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, config, tmp_path / "adapter")
    merge(llama, tmp_path / "adapter", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-7, rtol=1e-6)
