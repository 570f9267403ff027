"""What the demo claims, measured on text that no training saw: base ≠ adapter = merged."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 32
# float32 on both sides: the merge rounds each weight once, and the layers sum in another order.
TOLERANCE = 1e-3
REQUIRED_GAIN = 0.05


class ProofFailed(Exception):
    """A claim does not hold. The message says which."""


@dataclass(frozen=True)
class Candidate:
    """One way to load a model, its loss per completion token, and its logits on the first held-out rows."""

    name: str
    loss: float
    logits: Any


@dataclass(frozen=True)
class Proof:
    """`difference`: name → largest distance of its logits from those of base + adapter, loaded by lora_core."""

    candidates: list[Candidate]
    difference: dict[str, float]
    samples: list[tuple[str, str, str, str]]  # question, the real answer, the base's, the adapter's


def prove(
    base: Path, adapter: Path, merged: Path, rows: Sequence[dict[str, str]], questions: Sequence[dict[str, str]]
) -> Proof:
    """Load each model as its users would, measure all on `rows`, ask them `questions`; ProofFailed if a claim fails."""
    from lora_core.data import tokenize_rows
    from lora_core.model import load_base

    tokenizer = load_base(base)[1]
    examples = tokenize_rows(tokenizer, rows, max_length=256).examples
    answers: dict[str, list[str]] = {}
    candidates: list[Candidate] = []
    for name, load in loaders(base, adapter, merged).items():
        model = load()
        candidates.append(Candidate(name, loss_of(model, examples), logits_of(model, examples[:BATCH])))
        answers[name] = [answer(model, tokenizer, row["prompt"]) for row in questions]
    ours = next(c for c in candidates if c.name == ADAPTED)
    difference = {c.name: float((c.logits - ours.logits).abs().max()) for c in candidates if c is not ours}
    samples = [
        (row["prompt"], row["completion"].strip(), answers[BASE][i], answers[ADAPTED][i])
        for i, row in enumerate(questions)
    ]
    check(candidates, difference)
    return Proof(candidates, difference, samples)


BASE, ADAPTED, PEFT, MERGED = "base", "base + adapter (lora_core)", "base + adapter (peft)", "merged"


def loaders(base: Path, adapter: Path, merged: Path) -> dict[str, Callable[[], Any]]:
    """How each model is loaded; peft's way only where peft is installed."""
    from transformers import AutoModelForCausalLM

    from lora_core.adapter import load_adapter
    from lora_core.model import load_base

    def plain(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def ours() -> Any:
        model = load_base(base, "float32", device="cpu")[0]
        load_adapter(model, adapter)
        return model.eval()

    def with_peft() -> Any:
        # peft imports it wherever it is installed; it then misses a kernel for 4-bit products, which nothing here uses.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        from peft import PeftModel

        return PeftModel.from_pretrained(plain(base), str(adapter)).eval()

    found: dict[str, Callable[[], Any]] = {BASE: lambda: plain(base), ADAPTED: ours}
    if importlib.util.find_spec("peft"):
        found[PEFT] = with_peft
    return {**found, MERGED: lambda: plain(merged)}


def check(candidates: Sequence[Candidate], difference: dict[str, float]) -> None:
    """ProofFailed unless the adapter is better than the base and everything that should equal it does."""
    loss = {c.name: c.loss for c in candidates}
    if not loss[ADAPTED] < loss[BASE] * (1 - REQUIRED_GAIN):
        raise ProofFailed(f"The adapter is not better than its base: {loss[ADAPTED]:.4f} against {loss[BASE]:.4f}.")
    if difference[BASE] <= TOLERANCE:
        raise ProofFailed("The adapter does not change what the base says.")
    for name in difference.keys() - {BASE}:
        if not difference[name] <= TOLERANCE:
            raise ProofFailed(f"{name} does not equal the adapter: logits differ by {difference[name]:.2e}.")


def loss_of(model: Any, examples: Sequence[Any]) -> float:
    """Cross entropy per token of the completions, by the model's plain forward pass."""
    import torch

    total, count = 0.0, 0
    for start in range(0, len(examples), BATCH):
        ids, labels = padded(examples[start : start + BATCH])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attended(examples[start : start + BATCH])).logits
        wanted = labels[:, 1:] != -100
        total += float(
            torch.nn.functional.cross_entropy(logits[:, :-1][wanted].float(), labels[:, 1:][wanted], reduction="sum")
        )
        count += int(wanted.sum())
    return total / count


def logits_of(model: Any, examples: Sequence[Any]) -> Any:
    """Logits at all real tokens of `examples`, (tokens, vocabulary)."""
    import torch

    ids, _ = padded(examples)
    mask = attended(examples)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def padded(examples: Sequence[Any]) -> tuple[Any, Any]:
    """Token ids and labels, (rows, longest), padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(example.input_ids, dtype=torch.long) for example in examples]
    labels = [torch.tensor(example.labels, dtype=torch.long) for example in examples]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def attended(examples: Sequence[Any]) -> Any:
    """1 at real tokens, 0 at padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence(
        [torch.ones(len(example.input_ids), dtype=torch.long) for example in examples], batch_first=True
    )


def answer(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 32) -> str:
    """The likeliest continuation of `prompt`, on one line."""
    import torch

    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split())
