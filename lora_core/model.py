"""Load a checked base model for training. Safetensors only, nothing fetched, no code from the folder."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_core.base import check_base
from lora_core.errors import BadBase

Dtype = Literal["auto", "float32", "bfloat16"]


def load_base(directory: Path, dtype: Dtype = "auto", *, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), the model frozen and in eval mode. BadBase if the folder does not pass `check_base`.

    "auto" is bfloat16 where the weights are stored so and the machine computes in it natively, else float32.
    `device` defaults to CUDA if there is one.
    """
    facts = check_base(directory)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = "bfloat16" if facts.dtype == "bfloat16" and has_native_bfloat16(where) else "float32"
    local = {"local_files_only": True, "trust_remote_code": False}
    loader: Any = AutoModelForCausalLM  # its annotations know nothing of output_loading_info
    model, info = loader.from_pretrained(
        directory,
        **local,
        use_safetensors=True,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    for problem, keys in info.items():
        # transformers would train on random numbers in place of a missing tensor, with a warning
        if keys:
            raise BadBase(f"the checkpoint does not fit its config: {problem} {str(sorted(keys)[0])[:200]}")
    tokenizer = AutoTokenizer.from_pretrained(directory, **local)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BadBase("the tokenizer must have a tokenizer.json and an end-of-sequence token")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise BadBase("the tokenizer has more tokens than the model has embeddings")
    return model.to(where).requires_grad_(requires_grad=False).eval(), tokenizer


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; emulation is tens of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
