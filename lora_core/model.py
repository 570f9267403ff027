"""Load a checked base model for training. Safetensors only, nothing fetched, no code from the folder."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lora_core.architectures import Kind
from lora_core.base import LANGUAGE_MODELS, check_base
from lora_core.errors import BadBase

Dtype = Literal["auto", "float32", "bfloat16"]

_WITHOUT_SDPA = frozenset({"deberta-v2"})  # its attention has terms of its own
_READ_AND_WRITE: Final[tuple[Kind, ...]] = ("encoder-decoder",)
_CLASSIFIERS: Final[tuple[Kind, ...]] = ("decoder", "encoder")
_HEADS = frozenset({"classifier", "score", "pooler"})


def load_base(directory: Path, dtype: Dtype = "auto", *, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), the model frozen and in eval mode. BadBase if the folder does not pass `check_base`.

    "auto" is bfloat16 where the weights are stored so and the machine computes in it natively, else float32.
    `device` defaults to CUDA if there is one.
    """
    model, info = _load(AutoModelForCausalLM, directory, dtype, device, kinds=LANGUAGE_MODELS)
    _require_all(info)
    return model, _tokenizer(directory, model)


def load_seq2seq_base(directory: Path, dtype: Dtype = "auto", *, device: str | None = None) -> tuple[Any, Any]:
    """The same for a model that reads a source and writes a target, such as T5."""
    model, info = _load(AutoModelForSeq2SeqLM, directory, dtype, device, kinds=_READ_AND_WRITE)
    _require_all(info)
    return model, _tokenizer(directory, model)


def load_classifier_base(
    directory: Path, num_labels: int, *, seed: int = 0, dtype: Dtype = "auto", device: str | None = None
) -> tuple[Any, Any, tuple[str, ...]]:
    """(model, tokenizer, fresh): a language model or encoder with an output of `num_labels` numbers per row.

    `fresh` are the modules that the checkpoint lacks. They start at random, by `seed`, and belong into
    `modules_to_save`: an adapter without them would mean something else each time it is loaded.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = _load(
            AutoModelForSequenceClassification,
            directory,
            dtype,
            device,
            kinds=_CLASSIFIERS,
            num_labels=num_labels,
        )
    # What the checkpoint has beyond the model is the head it was pre-trained with.
    _require_all(info | {"missing_keys": (), "unexpected_keys": ()})
    tokenizer = _tokenizer(directory, model, writes=False)
    config = model.config
    if config.pad_token_id is None:  # by which a language model finds the end of each row
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if config.pad_token_id is None:
        raise BadBase("neither config.json nor the tokenizer names a token for padding")
    return model, tokenizer, _fresh_modules(model, info["missing_keys"])


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; emulation is tens of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _load(
    loader: Any, directory: Path, dtype: Dtype, device: str | None, *, kinds: Collection[Kind], **settings: Any
) -> tuple[Any, dict[str, Any]]:
    facts = check_base(directory, kinds)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = "bfloat16" if facts.dtype == "bfloat16" and has_native_bfloat16(where) else "float32"
    model, info = loader.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, dtype),
        attn_implementation="eager" if facts.architecture in _WITHOUT_SDPA else "sdpa",
        output_loading_info=True,
        **settings,
    )
    return model.to(where).requires_grad_(requires_grad=False).eval(), info


def _require_all(info: dict[str, Any]) -> None:
    for problem, keys in info.items():
        # transformers would train on random numbers in place of a missing tensor, with a warning
        if keys:
            raise BadBase(f"the checkpoint does not fit its config: {problem} {str(sorted(keys)[0])[:200]}")


def _tokenizer(directory: Path, model: Any, *, writes: bool = True) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast or (writes and tokenizer.eos_token_id is None):
        raise BadBase("the tokenizer must have a tokenizer.json and an end-of-sequence token")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise BadBase("the tokenizer has more tokens than the model has embeddings")
    return tokenizer


def _fresh_modules(model: Any, missing: Collection[str]) -> tuple[str, ...]:
    """The outermost modules of which the checkpoint has no parameter. BadBase if it lacks a part of one."""
    lacking = set(missing)
    fresh: list[str] = []
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= lacking:
            fresh.append(path)
            lacking -= own
    lacking |= {path for path in fresh if path.rpartition(".")[2] not in _HEADS}
    if lacking:
        raise BadBase(f"the checkpoint does not fit its config: it lacks {min(lacking)[:200]}")
    return tuple(fresh)
