"""Rows that share a row say what they say alone."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lora_core.batching import micro_batches
from lora_core.config import LoraConfig
from lora_core.data import IGNORED, Example, tokenize_rows
from lora_core.inject import inject
from lora_core.loss import collate, loss_sum, packed_loss_sum
from lora_core.model import load_base
from lora_core.packing import PACKED_FAMILIES, can_pack, documents_apart, pack
from lora_core.train import TrainConfig, train
from lora_core.trainable import trained_parameters
from tests.tiny import FAMILIES, make_base, make_rows


def prepared(base: Path) -> tuple:
    model, tokenizer = load_base(base)
    inject(model, LoraConfig(r=4, lora_alpha=16), 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained_parameters(model).items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model, tokenize_rows(tokenizer, make_rows(5), 100).examples


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", sorted(PACKED_FAMILIES))
def test_the_packed_loss_is_the_sum_of_single_losses(tmp_path: Path, family: str) -> None:
    model, examples = prepared(make_base(tmp_path / "base", family))
    assert can_pack(model)
    alone = sum(loss_sum(model, *collate([example], model.device)) for example in examples)
    alone.backward()
    expected = gradients(model)
    with documents_apart(model):
        together = packed_loss_sum(model, pack(examples, model.device))
        together.backward()
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(gradients(model), expected, atol=2e-4, rtol=1e-4)


def test_a_sliding_window_stays_inside_its_row(tmp_path: Path) -> None:
    model, examples = prepared(make_base(tmp_path / "base", "mistral"))
    whole = loss_sum(model, *collate(examples[:1], model.device))
    model.config.sliding_window = 8
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 8
    with torch.no_grad(), documents_apart(model):
        together = packed_loss_sum(model, pack(examples, model.device))
    with torch.no_grad():
        alone = [loss_sum(model, *collate([example], model.device)) for example in examples]
    torch.testing.assert_close(together, sum(alone))
    assert abs(alone[0] - whole) > 1e-3  # the window does something here


def test_families_that_cannot_are_padded_and_train_all_the_same(tmp_path: Path) -> None:
    left = sorted(set(FAMILIES) - PACKED_FAMILIES)
    assert left == ["falcon", "stablelm"]
    model, examples = prepared(make_base(tmp_path / "base", left[0]))
    assert not can_pack(model)
    losses: list[float] = []
    train(
        model, examples, TrainConfig(n_epochs=3, learning_rate=1e-2), on_step=lambda report: losses.append(report.loss)
    )
    assert losses[-1] < losses[0]


def test_packing_is_an_option_that_changes_no_loss(llama: Path) -> None:
    losses = []
    for packing in (True, False):
        model, examples = prepared(llama)
        config = TrainConfig(n_epochs=2, batch_size=3, packing=packing)
        train(model, examples, config, on_step=lambda report: losses.append(report.loss))
    assert len(losses) == 8
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)


def test_the_model_attends_as_before_afterwards(llama: Path) -> None:
    model, examples = prepared(llama)
    batch = collate(examples, model.device)
    with torch.no_grad():
        before = loss_sum(model, *batch)
        with pytest.raises(RuntimeError, match="broken"), documents_apart(model):
            raise RuntimeError("broken")
        assert torch.equal(loss_sum(model, *batch), before)


def test_nothing_else_runs_while_documents_are_apart(llama: Path) -> None:
    """A padded batch would be attended as one document; that must not pass silently."""
    model, examples = prepared(llama)
    with documents_apart(model), pytest.raises(TypeError, match="document_lengths"):
        loss_sum(model, *collate(examples, model.device))


def test_the_first_token_of_a_row_is_no_target(llama: Path) -> None:
    _, examples = prepared(llama)
    labelled = [Example(example.input_ids, example.input_ids) for example in examples]
    packed = pack(labelled, torch.device("cpu"))
    lengths = [len(example.input_ids) for example in examples]
    firsts = [sum(lengths[:index]) for index in range(len(lengths))]
    assert (packed.labels[0] == IGNORED).nonzero().flatten().tolist() == firsts
    assert int((packed.labels[:, 1:] != IGNORED).sum()) == sum(example.targets for example in labelled)
    assert packed.positions[0, firsts].tolist() == [0] * len(firsts)


def test_pieces_of_a_step_hold_at_most_the_limit() -> None:
    lengths = [5, 9, 3, 7, 2]
    rows = range(5)
    assert micro_batches(rows, lengths, max_tokens=16, packed=True) == [[1, 3], [0, 2, 4]]
    assert micro_batches(rows, lengths, max_tokens=16) == [[1], [3, 0], [2, 4]]
    assert micro_batches(rows, lengths, max_tokens=1, packed=True) == [[1], [3], [0], [2], [4]]


def test_a_packed_run_has_no_row_of_zeros(llama: Path) -> None:
    model, examples = prepared(llama)
    seen: list[torch.Size] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    train(model, examples, dataclasses.replace(TrainConfig(), max_steps=1))
    assert seen == [(1, sum(len(example.input_ids) for example in examples), 32)]
