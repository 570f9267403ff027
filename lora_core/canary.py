"""Canary prompts: what base and adapter say to them, and what a merged checkpoint says, token by token.

Both models compute in float32, which holds the numbers of every checkpoint exactly: what differs is what the merge
did. One model is in memory at a time."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter import load_adapter
from lora_core.base import check_base
from lora_core.errors import LoraError, NonFinite, NotFaithful
from lora_core.faithful import Comparison, PromptDifference
from lora_core.inject import adapter_layers
from lora_core.merge_options import Start
from lora_core.model import load_base
from lora_core.qlora import NF4Weight, quantise_base

_TEXTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef variance(values):\n",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY name ORDER BY",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "died":',
)
_QUESTIONS = (
    "What is 17 plus 25?",
    "Write one sentence about the sea.",
    "Translate into German: Good morning, how are you?",
    "My order has not arrived. What can I do?",
)
_MAX_TOKENS = 32
_NUMBERED = 2  # prompts of token ids that no text gives
PROMPTS = len(_TEXTS) + len(_QUESTIONS) + _NUMBERED
# float32 arithmetic itself errs by some units in the last place, in another order for W + BA than for Wx + BAx.
_FLOAT32_UNITS = 8
_CHUNK = 2**22


@dataclass(frozen=True)
class Prompt:
    name: str
    ids: tuple[int, ...]
    is_text: bool = True


@dataclass(frozen=True)
class _Said:
    """What base and adapter said, what the base alone said, and the paths of what the adapter changes."""

    prompts: tuple[Prompt, ...]
    adapter: list[Tensor]
    effect_kl: float
    base_loss: float
    changed: tuple[str, ...]


def canary_prompts(tokenizer: Any) -> tuple[Prompt, ...]:
    """The same ids for the same tokenizer and chat template, always: four texts, four questions (as the template
    renders them for an answer, if there is one), and two rows of ids taken from SHA-256 of a number."""
    texts = {f"text_{number}": tokenizer(text)["input_ids"] for number, text in enumerate(_TEXTS, 1)}
    for number, question in enumerate(_QUESTIONS, 1):
        texts[f"question_{number}"] = _question(tokenizer, question)
    prompts = [Prompt(name, tuple(ids[:_MAX_TOKENS])) for name, ids in texts.items() if ids]
    for number in range(1, _NUMBERED + 1):
        digests = (hashlib.sha256(f"canary {number} {place}".encode()).digest() for place in range(_MAX_TOKENS))
        ids = tuple(int.from_bytes(digest[:8], "little") % len(tokenizer) for digest in digests)
        prompts.append(Prompt(f"ids_{number}", ids, is_text=False))
    return tuple(prompts)


def _question(tokenizer: Any, question: str) -> list[int]:
    rendered, special = question, True
    if tokenizer.chat_template:
        message = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        special = False  # the template has written them
    ids: list[int] = tokenizer(rendered, add_special_tokens=special)["input_ids"]
    return ids


def compare(
    base_dir: Path,
    adapter_dir: Path,
    merged_dirs: Mapping[Start, Path],
    *,
    start: Start = "original",
    scale: float = 1.0,
    on_answer: Callable[[], None] = lambda: None,
) -> Comparison:
    """The merge in `merged_dirs[start]` against base and adapter, of which the base is taken as it is or in 4 bits.

    With a merge of each start the losses of both are told. `on_answer` is called once per prompt and model: four of
    them, and three more for another start. A LoraError but for NotFaithful means that base and
    adapter cannot be computed with here; a merge that cannot be loaded is NotFaithful.
    """
    losses: dict[str, float] = {}
    for other, directory in merged_dirs.items():
        if other != start:
            said = _say(base_dir, adapter_dir, other, scale, on_answer)
            merged = logits_of(_load_merged(directory)[0], said.prompts, on_answer)
            losses |= _losses(other, said, merged)
            del said, merged
    said = _say(base_dir, adapter_dir, start, scale, on_answer)
    model, tokenizer = _load_merged(merged_dirs[start])
    if canary_prompts(tokenizer) != said.prompts:
        raise NotFaithful("the merged model reads the canary prompts as other tokens")
    merged = logits_of(model, said.prompts, on_answer)
    differences = tuple(map(_difference, said.prompts, said.adapter, merged))
    dtype = check_base(merged_dirs[start]).dtype
    converted = dtype != check_base(base_dir).dtype
    _roughen([model] if converted else [model.get_submodule(path) for path in said.changed], dtype)
    losses |= _losses(start, said, merged) | {"base": said.base_loss}
    return Comparison(
        prompts=differences,
        kl=_median_kl(said.adapter, merged),
        rounding_kl=_median_kl(merged, logits_of(model, said.prompts, on_answer)),
        effect_kl=said.effect_kl,
        losses=losses,
    )


def logits_of(model: Any, prompts: Iterable[Prompt], on_answer: Callable[[], None]) -> list[Tensor]:
    """Per prompt, (tokens, vocabulary) float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=device)
            answers.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
            on_answer()
    return answers


def _say(base_dir: Path, adapter_dir: Path, start: Start, scale: float, on_answer: Callable[[], None]) -> _Said:
    model, tokenizer = load_base(base_dir, "float32")
    prompts = canary_prompts(tokenizer)
    if start == "nf4":
        _leave_four_bits(model, getattr(torch, check_base(base_dir).dtype))
    base = logits_of(model, prompts, on_answer)
    load_adapter(model, adapter_dir)
    for layer in adapter_layers(model).values():
        layer.rescale(scale)
    adapter = logits_of(model.eval(), prompts, on_answer)
    if not all(rows.isfinite().all() for rows in adapter):
        raise NonFinite("base and adapter answer a canary prompt with NaN or infinity")
    changed = tuple(adapter_layers(model))
    del model
    gc.collect()
    return _Said(prompts, adapter, _median_kl(adapter, base), _loss(prompts, base), changed)


def _losses(start: Start, said: _Said, merged: list[Tensor]) -> dict[str, float]:
    return {f"adapter_on_{start}": _loss(said.prompts, said.adapter), f"merged_{start}": _loss(said.prompts, merged)}


def _load_merged(directory: Path) -> tuple[Any, Any]:
    try:
        return load_base(directory, "float32")
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except (LoraError, RuntimeError) as error:
        raise NotFaithful(f"the merged model cannot be loaded: {str(error)[:500]}") from error


def _leave_four_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Linear layers hold what 4 bits leave of them, in the dtype in which the base is stored."""
    for path in quantise_base(model):
        layer: Any = model.get_submodule(path)
        assert isinstance(layer.weight, NF4Weight)  # noqa: S101  just made so
        layer.weight = nn.Parameter(layer.weight.unpack().to(dtype).float(), requires_grad=False)


def _difference(prompt: Prompt, adapter: Tensor, merged: Tensor) -> PromptDifference:
    if adapter.shape != merged.shape:
        raise NotFaithful(f"the merged model has {merged.shape[1]} tokens, base and adapter {adapter.shape[1]}")
    if not merged.isfinite().all():
        raise NotFaithful("the merged model answers a canary prompt with NaN or infinity")
    kl = _kl(adapter, merged)
    return PromptDifference(
        name=prompt.name,
        tokens=len(prompt.ids),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        max_logit_difference=float((adapter - merged).abs().max()),
        top1_agreement=float((adapter.argmax(-1) == merged.argmax(-1)).double().mean()),
    )


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first ‖ second) of each row of logits, float64."""
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def _median_kl(first: list[Tensor], second: list[Tensor]) -> float:
    return float(torch.cat([_kl(*pair) for pair in zip(first, second, strict=True)]).median())


def _loss(prompts: Iterable[Prompt], logits: Iterable[Tensor]) -> float:
    """Mean −log p of each token of a text after those before it."""
    parts = []
    for prompt, rows in zip(prompts, logits, strict=True):
        if prompt.is_text and len(prompt.ids) > 1:
            targets = torch.tensor(prompt.ids[1:])
            parts.append(-rows[:-1].double().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return float(torch.cat(parts).mean())


@torch.no_grad()
def _roughen(modules: Iterable[nn.Module], dtype: str) -> None:
    """Add to each number of `modules` up to half a unit in the last place of `dtype`, as rounding once more would."""
    facts = torch.finfo(getattr(torch, dtype))
    factor = _FLOAT32_UNITS if dtype == "float32" else 1
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    for parameter in parameters.values():
        generator = torch.Generator(parameter.device).manual_seed(0)
        for part in parameter.view(-1).split(_CHUNK):
            _, exponent = torch.frexp(part)  # |part| in [2^(e-1), 2^e)
            unit = torch.ldexp(torch.full_like(part, facts.eps), exponent - 1)
            unit.clamp_(min=facts.smallest_normal * facts.eps)
            unit[part == 0] = 0
            noise = torch.rand(part.shape, generator=generator, device=part.device) - 0.5
            part.add_(noise * unit * factor)
