"""Whether vLLM would load an adapter, told from its config and header. Needs neither vLLM nor torch.

The rules are those of vLLM 0.33 (`vllm/lora/peft_helper.py`, `utils.py` and `lora_model.py`).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_core import strict_json
from lora_core.errors import BadConfig
from lora_core.gate import read_adapter_header, read_config_bytes

DEFAULT_MAX_RANK = 16
# What --max-lora-rank may be.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_NEEDED = ("r", "lora_alpha", "target_modules")
_REFUSED = {
    "use_dora": "DoRA is not computed there; merge the adapter",
    "lora_bias": "a bias of lora_B is not computed there; merge the adapter",
    "alora_invocation_tokens": "activated LoRA is not supported there",
    "layer_replication": "layers cannot be replicated there",
    "use_bdlora": "block-diagonal factors are not read there",
    "use_qalora": "pooled inputs are not computed there",
}
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_HEADS = ("classifier", "score")
# Model classes that take no adapters there.
_WITHOUT_LORA = frozenset({"GPT2LMHeadModel", "FalconForCausalLM"})
_TENSOR = re.compile(
    r"base_model\.model\..+\.(lora_[AB]\.weight|lora_embedding_[AB])"
    r"|base_model\.model\.(.+\.)?(classifier|score)\.(weight|bias)"
    r"|base_model\.model\.(.+\.)?(embed_tokens|lm_head)\.base_layer\.weight"
)


def check_vllm(directory: Path, *, max_lora_rank: int = DEFAULT_MAX_RANK, architecture: str | None = None) -> list[str]:
    """Sentences that say why vLLM, started with --max-lora-rank, would not serve the adapter; none if it would.

    `architecture` is the model class of the base, if that is to be looked at too. A folder that is no adapter at all is
    BadAdapter, BadConfig or BadHeader.
    """
    try:
        config = strict_json.loads(read_config_bytes(directory))
    except ValueError as error:
        raise BadConfig(f"adapter_config.json is {error}") from None
    if not isinstance(config, dict):
        raise BadConfig("adapter_config.json must hold one object")
    reasons = [*_config(config), *_ranks(config, max_lora_rank)]
    for tensor in read_adapter_header(directory).tensors:
        if not _TENSOR.fullmatch(tensor.name):
            reasons.append(f"{tensor.name} is no name that it knows; merge the adapter")
            break
    if architecture in _WITHOUT_LORA:
        reasons.append(f"{architecture} takes no adapters there; merge the adapter")
    return reasons


def _config(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _NEEDED:
        if config.get(name) is None:
            yield f"adapter_config.json lacks {name}"
    for name, why in _REFUSED.items():
        if config.get(name):
            yield f"{name} is set: {why}"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']}: trained biases are not read there; merge the adapter"
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        yield f"init_lora_weights is {str(start)[:80]}: its factors do not fit the base that is served"
    saved = config.get("modules_to_save") or []
    if other := [name for name in saved if name not in _HEADS]:
        yield f"modules_to_save holds {str(other[0])[:80]}; only {' and '.join(_HEADS)} are read there"


def _ranks(config: Mapping[str, Any], limit: int) -> Iterator[str]:
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((rank for rank in ranks if type(rank) is int), default=0)
    if largest > MAX_RANKS[-1]:
        yield f"its rank is {largest}, and {MAX_RANKS[-1]} is the most there; truncate it"
    elif largest > limit:
        enough = next(rank for rank in MAX_RANKS if rank >= largest)
        yield f"its rank is {largest}; start vLLM with --max-lora-rank {enough}, or truncate it"
