import copy

import pytest
import torch
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.data import IGNORED, tokenize_rows
from lora_core.dpo import DPO, tokenize_preferences
from lora_core.errors import BadConfig, DatasetError, NothingToLearn
from lora_core.inject import inject
from lora_core.model import load_base
from lora_core.train import TrainConfig, evaluate, train
from tests.tiny import make_base, make_rows

ROWS = [
    {
        "prompt": f"What is {i} plus {i}?",
        "chosen": f" {i} plus {i} equals {2 * i}.",
        "rejected": " I am fine, thank you.",
    }
    for i in range(8)
]


def openai_row(row):
    def said(text):
        return [{"role": "assistant", "content": text}]

    asked = {"messages": [{"role": "user", "content": row["prompt"]}]}
    return {"input": asked, "preferred_output": said(row["chosen"]), "non_preferred_output": said(row["rejected"])}


def prepared(base, rows=ROWS, **settings):
    model, tokenizer = load_base(base)
    examples = tokenize_preferences(tokenizer, rows, 64).examples
    inject(model, LoraConfig(r=4, lora_alpha=16, **settings), 0)
    return model, examples


def disturb(model):
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)


def log_probability(model, example):
    """From all logits of one row alone."""
    ids = torch.from_numpy(example.input_ids).long()[None]
    labels = torch.from_numpy(example.labels).long()[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return -F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("rows", [ROWS, [openai_row(row) for row in ROWS]])
def test_the_loss_is_that_of_the_paper_against_a_copy_of_the_base(tmp_path, rows):
    base = make_base(tmp_path / "base")
    model, examples = prepared(base, rows)
    disturb(model)
    reference, _ = load_base(base)
    expected = 0.0
    for pair in examples:
        policy = log_probability(model, pair.chosen) - log_probability(model, pair.rejected)
        anchor = log_probability(reference, pair.chosen) - log_probability(reference, pair.rejected)
        expected -= F.logsigmoid(0.3 * (policy - anchor))
    task = DPO(beta=0.3)
    batch = task.collate(examples, model.device)
    torch.testing.assert_close(task.loss_sum(model, batch), expected, atol=1e-4, rtol=1e-5)
    assert abs(expected - len(examples) * 0.6931) > 0.1


def test_a_fresh_adapter_prefers_nothing(tmp_path):
    model, examples = prepared(make_base(tmp_path / "base"), lora_dropout=0.5)
    task = DPO()
    margins = task.margins(model.train(), task.collate(examples, model.device))
    assert torch.equal(margins, torch.zeros(len(examples)))
    assert model.training


def test_training_teaches_the_preference_and_leaves_the_base(tmp_path):
    model, examples = prepared(make_base(tmp_path / "base"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    task = DPO()
    before = evaluate(model, examples, task=task)
    train(model, examples, TrainConfig(n_epochs=10, learning_rate=1e-2, batch_size=4), task=task)
    assert evaluate(model, examples, task=task) < before / 2
    assert (task.margins(model, task.collate(examples, model.device)) > 0).all()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)


def test_micro_batches_do_not_change_the_step(tmp_path):
    model, examples = prepared(make_base(tmp_path / "base"))
    losses = []
    for tokens in (64, 100_000):
        reports = []
        config = TrainConfig(batch_size=8, max_steps=1, tokens_per_batch=tokens)
        train(copy.deepcopy(model), examples, config, task=DPO(), on_step=reports.append)
        losses.append((reports[0].loss, reports[0].grad_norm))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_are_of_one_purpose(tmp_path):
    _, tokenizer = load_base(make_base(tmp_path / "base"))
    with pytest.raises(DatasetError, match="compare two answers"):
        tokenize_preferences(tokenizer, make_rows(2), 64)
    with pytest.raises(DatasetError, match="preference training"):
        tokenize_rows(tokenizer, ROWS, 64)


def test_pairs_that_are_cut_before_their_answers_are_left_out(tmp_path):
    _, tokenizer = load_base(make_base(tmp_path / "base"))
    long = [{"prompt": "plus " * 50, "chosen": "a", "rejected": "b"}]
    dataset = tokenize_preferences(tokenizer, ROWS + long, 40)
    assert (len(dataset.examples), dataset.skipped, dataset.truncated >= 1) == (len(ROWS), 1, True)
    with pytest.raises(NothingToLearn):
        tokenize_preferences(tokenizer, long, 40)


@pytest.mark.parametrize("beta", [0, -1, 101, float("nan")])
def test_beta_has_bounds(beta):
    with pytest.raises(BadConfig, match="beta"):
        DPO(beta)
