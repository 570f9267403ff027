import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lora_core.config import LoraConfig
from lora_core.data import IGNORED, tokenize_rows
from lora_core.errors import BadConfig, NoGradient, TrainingDiverged
from lora_core.inject import inject, lora_layers
from lora_core.loss import collate, loss_sum
from lora_core.model import load_base
from lora_core.schedule import lr_factor
from lora_core.task import CausalLM
from lora_core.train import TrainConfig, evaluate, train
from lora_core.trainable import trained_parameters
from tests.tiny import FAMILIES, make_base, make_rows


def prepared(base: Path, n=24, *, seed=0, **settings):
    model, tokenizer = load_base(base)
    inject(model, LoraConfig(r=4, lora_alpha=16, **settings), seed)
    return model, tokenize_rows(tokenizer, make_rows(n), 100).examples


def factors(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trained_parameters(model).values()]


def cut(examples, lengths):
    return [
        dataclasses.replace(example, input_ids=example.input_ids[:length], labels=example.labels[:length])
        for example, length in zip(examples, lengths, strict=False)
    ]


CONFIG = TrainConfig(n_epochs=2, batch_size=8, learning_rate=1e-2, tokens_per_batch=256)


def test_loss_falls_and_every_factor_moves(llama):
    model, examples = prepared(llama)
    start, reports = factors(model), []
    before = evaluate(model, examples)
    result = train(model, examples, CONFIG, eval_examples=examples, on_step=reports.append)
    assert result.eval_loss == evaluate(model, examples, tokens_per_batch=256) < before
    assert all(not torch.equal(old, new) for old, new in zip(start, factors(model), strict=True))
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.eval_loss is not None for report in reports] == [False, False, True] * 2
    assert (result.steps, result.stopped) == (6, False)
    assert result.trained_tokens == 2 * sum(len(example.input_ids) for example in examples)
    assert reports[0].tokens_per_second > 0
    assert not model.training


def test_two_runs_give_equal_bits_with_dropout(llama):
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model, examples = prepared(llama, lora_dropout=0.3)
        train(model, examples, CONFIG)
        runs.append(factors(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_frozen_base_does_not_move(llama):
    model, examples = prepared(llama)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, examples, CONFIG)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_at_labels_equals_the_loss_of_all_logits(tmp_path, family, tie):
    model, examples = prepared(make_base(tmp_path / "base", family, tie=tie))
    input_ids, labels = collate(examples[:5], model.device)
    with torch.no_grad():
        logits = model(input_ids).logits[:, :-1].flatten(0, 1)
        full = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        torch.testing.assert_close(loss_sum(model, input_ids, labels), full)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_changes_no_loss(tmp_path, family):
    model, examples = prepared(make_base(tmp_path / "base", family))
    examples = cut(examples, (46, 50, 60))
    with torch.no_grad():
        alone = sum(loss_sum(model, *collate([example], model.device)) for example in examples)
        torch.testing.assert_close(loss_sum(model, *collate(examples, model.device)), alone)


def test_micro_batches_do_not_change_a_step(llama):
    """The loss is averaged over the tokens of a step, not over micro-batches of unequal size."""
    results = []
    for tokens_per_batch in (64, 100_000):
        model, examples = prepared(llama, 6)
        reports = []
        config = TrainConfig(batch_size=6, max_steps=1, max_grad_norm=0, tokens_per_batch=tokens_per_batch)
        train(model, cut(examples, range(42, 60, 3)), config, on_step=reports.append)
        results.append((reports[0].loss, reports[0].grad_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_no_gradient_is_computed_below_the_first_adapted_layer(llama):
    model, examples = prepared(llama, target_modules=("layers.1.mlp.down_proj",))
    seen = {}
    model.model.layers[0].register_forward_hook(lambda _, __, out: seen.update(below=out.requires_grad))
    model.model.layers[1].register_forward_hook(lambda _, __, out: seen.update(above=out.requires_grad))
    loss_sum(model, *collate(examples[:2], model.device)).backward()
    assert seen == {"below": False, "above": True}


def test_should_stop_ends_between_steps(llama):
    model, examples = prepared(llama)
    answers = iter([False, False, True])
    result = train(model, examples, CONFIG, should_stop=lambda: next(answers))
    assert (result.steps, result.total_steps, result.stopped) == (2, 6, True)


def test_max_steps_cuts_the_run(llama):
    model, examples = prepared(llama)
    result = train(model, examples, dataclasses.replace(CONFIG, max_steps=4))
    assert (result.steps, result.total_steps, result.stopped) == (4, 4, False)


def test_a_loss_that_is_not_a_number_is_divergence(llama):
    model, examples = prepared(llama)
    with torch.no_grad():
        next(iter(trained_parameters(model).values()))[0, 0] = math.nan
    with pytest.raises(TrainingDiverged) as caught:
        train(model, examples, CONFIG)
    assert (caught.value.code, caught.value.details) == ("training_diverged", {"step": 1})


def test_a_factor_out_of_reach_is_reported(llama):
    model, examples = prepared(llama)
    layer = next(iter(lora_layers(model).values()))
    layer.register_parameter("spare", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(NoGradient, match="spare"):
        train(model, examples, CONFIG)


def test_a_model_without_anything_to_train_is_refused(llama):
    model, tokenizer = load_base(llama)
    with pytest.raises(NoGradient, match="nothing to train"):
        train(model, tokenize_rows(tokenizer, make_rows(2), 100).examples, CONFIG)


def test_a_frozen_factor_stays_and_the_rest_trains(llama):
    model, examples = prepared(llama)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}
    train(model, examples, CONFIG)
    moved = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert moved == {name for name in before if name.endswith("lora_B")}


def test_after_step_sees_the_gradients_and_the_moved_parameters(llama):
    model, examples = prepared(llama)
    seen = []

    def look(step: int) -> None:
        seen.append((step, all(p.grad is not None for p in trained_parameters(model).values())))

    train(model, examples, CONFIG, after_step=look)
    assert seen == [(step, True) for step in range(1, 7)]


class Halved(CausalLM):
    """A task of its own, whose loss is half of the usual one."""

    def loss_sum(self, model, batch):
        return super().loss_sum(model, batch) / 2


def test_another_task_brings_its_own_loss(llama):
    model, examples = prepared(llama)
    reports = []
    train(model, examples, dataclasses.replace(CONFIG, max_steps=1), task=Halved(), on_step=reports.append)
    again, _ = prepared(llama)
    train(again, examples, dataclasses.replace(CONFIG, max_steps=1), on_step=reports.append)
    assert reports[0].loss == pytest.approx(reports[1].loss / 2)
    assert evaluate(model, examples, task=Halved()) == pytest.approx(evaluate(model, examples) / 2)


def test_bfloat16_base_trains_float32_factors(tmp_path):
    base = make_base(tmp_path / "base", dtype="bfloat16")
    model, tokenizer = load_base(base, "bfloat16")
    inject(model, LoraConfig(r=4, lora_alpha=16), 0)
    examples = tokenize_rows(tokenizer, make_rows(24), 100).examples
    before = evaluate(model, examples)
    train(model, examples, CONFIG)
    assert evaluate(model, examples) < before
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}


def test_an_adapted_output_layer_trains(llama):
    model, examples = prepared(llama, target_modules=("lm_head",))
    before = evaluate(model, examples)
    train(model, examples, CONFIG)
    assert evaluate(model, examples) < before - 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_epochs", 0),
        ("batch_size", 0),
        ("max_steps", 0),
        ("learning_rate", 0),
        ("learning_rate", math.nan),
        ("lr_scheduler_type", "step"),
        ("warmup_ratio", 1.1),
        ("weight_decay", -1),
        ("max_grad_norm", math.inf),
        ("tokens_per_batch", 0),
    ],
)
def test_a_bad_setting_is_refused_by_name(name, value):
    with pytest.raises(BadConfig, match=name):
        TrainConfig(**{name: value})


def test_schedules_warm_up_and_come_down():
    def rates(schedule):
        return [round(lr_factor(step, total=6, warmup=2, schedule=schedule), 3) for step in range(6)]

    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("cosine") == [0.5, 1, 1, 0.854, 0.5, 0.146]
