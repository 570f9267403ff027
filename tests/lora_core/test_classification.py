import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from lora_core.adapter import load_adapter, save_adapter
from lora_core.classification import Classification, tokenize_labelled
from lora_core.config import LoraConfig
from lora_core.errors import BadBase, BadConfig, DatasetError
from lora_core.inject import inject
from lora_core.model import load_base, load_classifier_base
from lora_core.train import TrainConfig, evaluate, train
from tests.tiny import ENCODERS, make_base

ROWS = [
    {"text": f"{word} {i} plus {i}", "label": label}
    for i in range(6)
    for label, word in enumerate(["Hello", "fox", "dog"])
]


def prepared(base, rows=ROWS, num_labels=3, **settings):
    model, tokenizer, fresh = load_classifier_base(base, num_labels)
    examples = tokenize_labelled(tokenizer, rows, 64).examples
    config = LoraConfig(r=4, lora_alpha=16, task_type="SEQ_CLS", modules_to_save=fresh, **settings)
    inject(model, config, 0)
    return model, examples, config, Classification(num_labels, pad_token_id=model.config.pad_token_id)


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_a_trained_classifier_means_the_same_to_peft_and_to_us(tmp_path, family):
    base = make_base(tmp_path / "base", family)
    model, examples, config, task = prepared(base)
    before = evaluate(model, examples, task=task)
    train(model, examples, TrainConfig(n_epochs=12, learning_rate=1e-2, batch_size=6), task=task)
    assert evaluate(model, examples, task=task) < before / 2
    save_adapter(model, config, tmp_path / "adapter")
    input_ids, mask, _ = task.collate(examples[:3], model.device)
    with torch.no_grad():
        ours = model(input_ids=input_ids, attention_mask=mask).logits
        # Another seed: nothing that was fresh may be left to chance.
        again, _, _ = load_classifier_base(base, 3, seed=99)
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(input_ids=input_ids, attention_mask=mask).logits, ours)
        theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        theirs.config.pad_token_id = model.config.pad_token_id
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=input_ids, attention_mask=mask).logits, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "fresh"), [("bert", ("bert.pooler", "classifier")), ("llama", ("score",))])
def test_what_the_checkpoint_lacks_is_named_and_starts_by_seed(tmp_path, family, fresh):
    base = make_base(tmp_path / "base", family)
    first, _, named = load_classifier_base(base, 3, seed=1)
    second, _, _ = load_classifier_base(base, 3, seed=1)
    other, _, _ = load_classifier_base(base, 3, seed=2)
    assert named == fresh
    head = f"{fresh[-1]}.weight"
    assert torch.equal(first.get_parameter(head), second.get_parameter(head))
    assert not torch.equal(first.get_parameter(head), other.get_parameter(head))


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "bert")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layer.1." not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadBase, match=r"lacks bert\.encoder\.layer\.1"):
        load_classifier_base(base, 3)


def test_rows_of_a_batch_are_classified_as_if_alone(tmp_path):
    for family in ("bert", "llama"):
        model, examples, _, task = prepared(make_base(tmp_path / family, family), [*ROWS, {"text": "a", "label": 0}])
        mixed = [examples[-1], *examples[:4]]
        with torch.no_grad():
            alone = sum(task.loss_sum(model, task.collate([example], model.device)) for example in mixed)
            torch.testing.assert_close(task.loss_sum(model, task.collate(mixed, model.device)), alone)


def test_one_label_is_a_number_to_tell(tmp_path):
    rows = [{"text": f"{i} plus", "text_pair": f"minus {i}", "label": i / 4} for i in range(6)]
    model, examples, _, task = prepared(make_base(tmp_path / "base", "bert"), rows, num_labels=1)
    input_ids, mask, labels = task.collate(examples, model.device)
    with torch.no_grad():
        told = model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
        expected = F.mse_loss(told, torch.tensor([i / 4 for i in range(6)]), reduction="sum")
        torch.testing.assert_close(task.loss_sum(model, (input_ids, mask, labels)), expected)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 1}, "row 1 needs a text"),
        ({"text": "a"}, "a label"),
        ({"text": "a", "label": True}, "a label"),
        ({"text": "a", "label": float("nan")}, "a label"),
        ({"text": "a", "text_pair": 3, "label": 1}, "text_pair"),
        ({"text": "a", "label": 3}, "3 is no class"),
        ({"text": "a", "label": 0.5}, "0.5 is no class"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, row, words):
    base = make_base(tmp_path / "base", "bert")
    _, tokenizer, _ = load_classifier_base(base, 3)
    task = Classification(3, pad_token_id=2)
    with pytest.raises(DatasetError, match=words):
        task.collate(tokenize_labelled(tokenizer, [row], 64).examples, torch.device("cpu"))


def test_an_encoder_writes_nothing(tmp_path):
    base = make_base(tmp_path / "base", "bert")
    with pytest.raises(BadBase, match="'bert' is not supported"):
        load_base(base)
    with pytest.raises(BadConfig, match="num_labels"):
        Classification(0, pad_token_id=0)
    assert json.loads((base / "config.json").read_text())["model_type"] == "bert"
