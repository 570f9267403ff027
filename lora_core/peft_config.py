"""What a merge must know of any adapter_config.json that PEFT writes, LoRA or AdaLoRA.

Wider than `LoraConfig`, which is what is trained here. What this release cannot merge exactly is refused by name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lora_core import config_fields, strict_json
from lora_core.config import MAX_CONFIG_BYTES, MAX_RANK, scaling
from lora_core.errors import BadConfig
from lora_core.targets import lookup, matches

# Initialisations that subtract something from the base: their factors fit that changed base, and no other.
_CHANGE_THE_BASE = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga")
_LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
# Settings that make the adapter do more than add one matrix to another, and the reason given.
_NOT_A_MATRIX = {
    "alora_invocation_tokens": "an activated LoRA works only after its invocation tokens",
    "arrow_config": "an Arrow router chooses between adapters for each token",
    "kasa_config": "KaSA truncates the base",
    "layer_replication": "the adapter's model has layers that the base has not",
    "monteclora_config": "its factors are random variables",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "it pools the input",
}
# What decided where the adapter was put or how it was trained; the file's tensors already tell the result.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
        *("corda_config", "eva_config", "layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "velora_config"),
        *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"),
    }
)
_USED = frozenset(
    {
        *("alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights"),
        *("init_r", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules"),
        *("target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
    }
)
_FLAGS = ("ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_rslora")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,31}")
_MAX_NAMES = 10_000


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`target_modules` is None where no list of names was given: every module, or a regular expression.

    `peft_version` is (0, 0, 0) for those that did not write it, all before 0.18.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | None
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    # in the order of the file
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    # by module name; the key "" is the input embedding
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    bias: str = "none"
    init_r: int | None = None  # of AdaLoRA, else None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    # names of modules that are not adapted although they are targets; None where the config tells it otherwise
    exclude_modules: tuple[str, ...] | None = ()
    peft_version: tuple[int, int, int] = (0, 0, 0)

    def rank_for(self, path: str) -> int | None:
        """r of one module or parameter; None for AdaLoRA, where each keeps the rank it was pruned to."""
        return None if self.init_r else lookup(self.rank_pattern, path, self.r)

    def scaling_for(self, path: str) -> float:
        """The factor of lora_B · lora_A. AdaLoRA divides by the rank it began with, as PEFT does."""
        alpha = lookup(self.alpha_pattern, path, self.lora_alpha)
        if self.init_r:
            return self.lora_alpha / (self.init_r + 1e-5)
        r = lookup(self.rank_pattern, path, self.r)
        return scaling(alpha, r, use_rslora=self.use_rslora)

    def may_lack(self, target: str) -> bool:
        """Whether all modules of this name in `target_modules` may be without factors: excluded, or saved whole."""
        if self.exclude_modules is None:
            return True
        return any(matches(target, n) or matches(n, target) for n in (*self.exclude_modules, *self.modules_to_save))

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse `adapter_config.json`. BadConfig names what is malformed or cannot be merged."""
        document = _document(data)
        adalora = document["peft_type"] == "ADALORA"
        init_r = _number("init_r", document.get("init_r", 12), 1, MAX_RANK) if adalora else None
        targets = document.get("target_modules")
        return cls(
            r=int(_number("r", document.get("r", 8), 1, MAX_RANK)),
            lora_alpha=_number("lora_alpha", document.get("lora_alpha", 8), 0, 1e9),
            target_modules=None if isinstance(targets, str) else _names("target_modules", targets),
            target_parameters=_names("target_parameters", document.get("target_parameters")),
            modules_to_save=_names("modules_to_save", document.get("modules_to_save")),
            # of AdaLoRA this is what was pruned, which the shapes tell as well
            rank_pattern={} if adalora else dict(_pattern("rank_pattern", document, 1, MAX_RANK)),
            alpha_pattern=dict(_pattern("alpha_pattern", document, 0, 1e9)),
            trainable_token_indices=dict(_tokens(document.get("trainable_token_indices"))),
            bias=document.get("bias", "none"),
            init_r=int(init_r) if init_r else None,
            exclude_modules=_excluded(document),
            peft_version=config_fields.version(document.get("peft_version")),
            **{name: bool(document.get(name)) for name in _FLAGS},
        )


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise BadConfig(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        document = strict_json.loads(data)
    except ValueError as error:
        raise BadConfig(f"adapter_config.json is {error}") from None
    if not isinstance(document, dict):
        raise BadConfig("adapter_config.json must hold one object")
    if document.get("peft_type") not in ("LORA", "ADALORA"):
        raise BadConfig(f'peft_type must be "LORA" or "ADALORA", not {str(document.get("peft_type"))[:40]!r}')
    for name, value in document.items():
        if name in _NOT_A_MATRIX and value:
            raise BadConfig(f"{name} is set, so this adapter cannot be merged: {_NOT_A_MATRIX[name]}")
        if value and name not in _NOT_A_MATRIX and name not in _USED | _WITHOUT_EFFECT:
            raise BadConfig(f"{name[:80]} is not supported here, and this adapter sets it")
        if name in _FLAGS and not isinstance(value, bool | None):
            raise BadConfig(f"{name} must be true or false, not {str(value)[:80]!r}")
    if document.get("bias", "none") not in ("none", "all", "lora_only"):
        raise BadConfig(f"bias must be none, all or lora_only, not {str(document['bias'])[:80]!r}")
    for target in _names("target_parameters", document.get("target_parameters")):
        if "." not in target:
            raise BadConfig(f"target_parameters holds {target[:80]}; it must name the module as well")
    _check_init(document.get("init_lora_weights", True))
    return document


def _check_init(init: Any) -> None:
    if isinstance(init, str) and _CHANGE_THE_BASE.fullmatch(init.lower()):
        raise BadConfig(
            f"init_lora_weights is {init}: this adapter was trained on a base that its initialisation changed. "
            "Have PEFT save it with path_initial_model_for_weight_conversion, and it becomes an ordinary LoRA"
        )
    if not isinstance(init, bool | None) and init not in _LEAVE_THE_BASE:
        raise BadConfig(f"init_lora_weights is {str(init)[:80]!r}, which is not known here")


def _pattern(name: str, document: Mapping[str, Any], low: float, high: float) -> Iterator[tuple[str, Any]]:
    value = document.get(name) or {}
    if not isinstance(value, dict) or len(value) > _MAX_NAMES:
        raise BadConfig(f"{name} must map at most {_MAX_NAMES} module names to numbers")
    for key, number in value.items():
        plain = key.replace("\\.", ".")
        if not _PATH.fullmatch(plain.removeprefix("^")):
            raise BadConfig(f"{name} holds the regular expression {key[:80]!r}; only dotted module names are read")
        yield plain, _number(f"{name}[{key[:80]}]", number, low, high)


def _number(name: str, value: Any, low: float, high: float) -> float:
    """`low` = 1 asks for a whole number, 0 for one above 0."""
    kinds = (int,) if low else (int, float)
    if type(value) not in kinds or not low <= value <= high or value == 0:
        raise BadConfig(f"{name} must be a number up to {high}, not {str(value)[:80]!r}")
    return float(value) if not low else value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_NAMES:
        raise BadConfig(f"{name} must be a list of at most {_MAX_NAMES} names")
    if bad := [item for item in value if not isinstance(item, str) or not _PATH.fullmatch(item)]:
        raise BadConfig(f"{name} holds {str(bad[0])[:80]!r}, which is not a dotted name")
    return tuple(sorted(set(value)))


def _excluded(document: Mapping[str, Any]) -> tuple[str, ...] | None:
    excluded = document.get("exclude_modules")
    if isinstance(excluded, str) or document.get("layers_to_transform") is not None:
        return None
    return _names("exclude_modules", excluded)


def _tokens(value: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, indices in (value if isinstance(value, dict) else {"": value} if value else {}).items():
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise BadConfig("trainable_token_indices must be a list of token ids, or map module names to such lists")
        if len(set(indices)) != len(indices):
            raise BadConfig("trainable_token_indices names a token twice")
        yield name, tuple(indices)
