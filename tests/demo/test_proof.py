"""The proof of the demo must be able to fail."""

import shutil
from pathlib import Path

import pytest
import torch

from demo.proof import ADAPTED, BASE, MERGED, PEFT, Candidate, ProofFailed, check, loaders, loss_of, padded, prove
from lora_core.data import tokenize_rows
from lora_core.merge import merge
from lora_core.train import evaluate
from tests.lora_core.adapters import make_peft_adapter
from tests.tiny import make_base, make_rows

ROWS = make_rows(40, "prompt")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "merged"
    merge(base, adapter, out)
    return out


def test_an_adapter_that_is_no_better_than_its_base_fails(base: Path, adapter: Path, merged: Path) -> None:
    with pytest.raises(ProofFailed, match="not better"):
        prove(base, adapter, merged, ROWS, ROWS[:1])


def logits(model: torch.nn.Module, base: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    examples = tokenize_rows(AutoTokenizer.from_pretrained(base), ROWS[:4], 256).examples
    with torch.no_grad():
        return model(input_ids=padded(examples)[0]).logits


def test_every_way_to_load_the_adapter_gives_the_same_logits(base: Path, adapter: Path, merged: Path) -> None:
    models = {name: load() for name, load in loaders(base, adapter, merged).items()}
    seen = {name: logits(model, base) for name, model in models.items()}
    assert set(seen) == {BASE, ADAPTED, PEFT, MERGED}
    for name in (PEFT, MERGED):
        torch.testing.assert_close(seen[name], seen[ADAPTED], rtol=1e-4, atol=1e-4)
    assert (seen[BASE] - seen[ADAPTED]).abs().max() > 0.01


def test_the_loss_counts_the_tokens_of_completions_only(base: Path) -> None:
    model = loaders(base, base, base)[BASE]()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = tokenize_rows(tokenizer, ROWS, 256).examples
    assert loss_of(model, examples) == pytest.approx(evaluate(model, examples), rel=1e-4)
    first = examples[0]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor(first.input_ids, dtype=torch.long)[None]).logits[0].log_softmax(-1)
    wanted = [t for t in range(1, len(first.labels)) if first.labels[t] != -100]
    assert 0 < len(wanted) < len(first.labels) - 1
    expected = -sum(float(chances[t - 1, first.labels[t]]) for t in wanted) / len(wanted)
    assert loss_of(model, [first]) == pytest.approx(expected, rel=1e-5)


def three(loss: float, **distance: float) -> tuple[list[Candidate], dict[str, float]]:
    found = {BASE: 1.0, PEFT: 0.0, MERGED: 0.0, **{{"base": BASE, "merged": MERGED}[k]: v for k, v in distance.items()}}
    return [Candidate(BASE, 5.0, None), Candidate(ADAPTED, loss, None), Candidate(MERGED, loss, None)], found


def test_a_better_adapter_that_its_merge_equals_passes() -> None:
    check(*three(4.5))


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        (three(4.9), "not better"),
        (three(float("nan")), "not better"),
        (three(4.5, base=0.0), "does not change"),
        (three(4.5, merged=0.01), "merged does not equal"),
        (three(4.5, merged=float("nan")), "merged does not equal"),
    ],
)
def test_a_claim_that_does_not_hold_fails(candidates: tuple[list[Candidate], dict[str, float]], reason: str) -> None:
    with pytest.raises(ProofFailed, match=reason):
        check(*candidates)


def test_a_merge_of_another_adapter_is_noticed(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = make_peft_adapter(base, tmp_path / "other", r=4, target_modules=["q_proj"])
    merge(base, other, tmp_path / "merged")
    seen = {n: logits(load(), base) for n, load in loaders(base, adapter, tmp_path / "merged").items()}
    assert (seen[MERGED] - seen[ADAPTED]).abs().max() > 1e-3
    shutil.rmtree(tmp_path / "merged")
