import json

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from lora_core.adapter import load_adapter, save_adapter
from lora_core.config import LoraConfig
from lora_core.errors import BadBase, DatasetError
from lora_core.inject import inject
from lora_core.keymap_torch import build_keymap
from lora_core.merge import merge
from lora_core.model import load_base, load_seq2seq_base
from lora_core.plan import plan_merge
from lora_core.seq2seq import Seq2Seq, tokenize_pairs
from lora_core.shards import open_checkpoint
from lora_core.train import TrainConfig, evaluate, train
from tests.tiny import make_base, make_rows

TASK = Seq2Seq()


def prepared(base, rows=None):
    model, tokenizer = load_seq2seq_base(base)
    examples = tokenize_pairs(tokenizer, make_rows(8, "prompt") if rows is None else rows, 64).examples
    config = LoraConfig(r=4, lora_alpha=16, task_type="SEQ_2_SEQ_LM")
    inject(model, config, 0)
    return model, examples, config


def test_the_loss_is_that_of_transformers(tmp_path):
    model, examples, _ = prepared(make_base(tmp_path / "base", "t5"))
    source, mask, labels = TASK.collate(examples, model.device)
    with torch.no_grad():
        mean = model(input_ids=source, attention_mask=mask, labels=labels).loss
        count = sum(TASK.targets(example) for example in examples)
        torch.testing.assert_close(TASK.loss_sum(model, (source, mask, labels)), mean * count)
        alone = sum(TASK.loss_sum(model, TASK.collate([example], model.device)) for example in examples)
        torch.testing.assert_close(alone, mean * count)


def test_a_trained_adapter_means_the_same_to_peft_and_to_us(tmp_path):
    base = make_base(tmp_path / "base", "t5")
    model, examples, config = prepared(base)
    before = evaluate(model, examples, task=TASK)
    train(model, examples, TrainConfig(n_epochs=12, learning_rate=1e-2, batch_size=4), task=TASK)
    assert evaluate(model, examples, task=TASK) < before * 0.8
    save_adapter(model, config, tmp_path / "adapter")
    source, mask, labels = TASK.collate(examples[:3], model.device)
    batch = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": labels.clamp(min=0)}
    with torch.no_grad():
        ours = model(**batch).logits
        again, _ = load_seq2seq_base(base)
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(**batch).logits, ours)
        theirs = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "adapter")
        torch.testing.assert_close(theirs.eval()(**batch).logits, ours, atol=1e-5, rtol=0)


def test_the_merged_model_says_what_the_adapted_one_says(tmp_path):
    base = make_base(tmp_path / "base", "t5")
    model, examples, config = prepared(base)
    train(model, examples, TrainConfig(n_epochs=2, learning_rate=1e-2, batch_size=4), task=TASK)
    save_adapter(model, config, tmp_path / "adapter")
    keymap = build_keymap(json.loads((base / "config.json").read_bytes()), open_checkpoint(base).tensors())
    recipe = plan_merge(base, tmp_path / "adapter", keymap=keymap).recipe
    merge(base, tmp_path / "adapter", tmp_path / "merged", recipe=recipe)
    merged, _ = load_seq2seq_base(tmp_path / "merged")
    batch = TASK.collate(examples, model.device)
    with torch.no_grad():
        torch.testing.assert_close(TASK.loss_sum(merged, batch), TASK.loss_sum(model, batch), atol=1e-3, rtol=1e-5)


def test_kinds_of_models_and_rows_are_not_mixed_up(tmp_path):
    base = make_base(tmp_path / "base", "t5")
    with pytest.raises(BadBase, match="'t5' is not supported"):
        load_base(base)
    with pytest.raises(BadBase, match="'llama' is not supported"):
        load_seq2seq_base(make_base(tmp_path / "llama"))
    with pytest.raises(DatasetError, match="prompt and completion"):
        prepared(base, make_rows(1))


def test_long_sides_are_cut_and_keep_their_ends(tmp_path):
    _, tokenizer = load_seq2seq_base(make_base(tmp_path / "base", "t5"))
    dataset = tokenize_pairs(tokenizer, [{"prompt": "plus " * 50, "completion": "a"}], 16)
    assert dataset.truncated == 1
    assert len(dataset.examples[0].source) == 17
    assert dataset.examples[0].source[-1] == dataset.examples[0].target[-1] == tokenizer.eos_token_id
