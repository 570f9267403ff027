"""`LoraConfig` and PEFT's `adapter_config.json`, without torch. Field names are PEFT's."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Self

from lora_core import strict_json
from lora_core.errors import BadConfig, UnknownTargetModules

ALL_LINEAR: Final = "all-linear"
OUTPUT_LAYER = "lm_head"
MAX_RANK = 1024
MAX_CONFIG_BYTES = 2**20

_MODULE_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,31}")
# Written by PEFT with a value that is not "empty" and that means nothing for a plain LoRA.
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size"}
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter is made of. Construction validates; every error is a `BadConfig` that names the field.

    `rank_pattern` and `alpha_pattern` map a module path or a suffix of one to its own value. The first match in
    sorted order counts: PEFT takes the first in file order and sorts its file.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = ALL_LINEAR
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    init_lora_weights: Literal[True, "gaussian"] = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise BadConfig(f"lora_dropout must be a number from 0 to below 1, not {self.lora_dropout!r}")
        for name in ("use_rslora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise BadConfig(f"{name} must be true or false, not {getattr(self, name)!r}")
        self._check_supported()
        object.__setattr__(self, "target_modules", _targets(self.target_modules))
        object.__setattr__(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern, _check_rank))
        object.__setattr__(self, "alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _check_alpha))

    def _check_supported(self) -> None:
        if self.bias != "none":
            raise BadConfig(f'bias must be "none", not {self.bias!r}: biases are not trained here')
        if self.modules_to_save != ():
            raise BadConfig("modules_to_save must be empty: whole modules are not trained here")
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise BadConfig(f'init_lora_weights must be true or "gaussian", not {self.init_lora_weights!r}')
        if self.task_type != "CAUSAL_LM":
            raise BadConfig(f'task_type must be "CAUSAL_LM", not {self.task_type!r}')
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and len(value) <= 1024 and value.isprintable()):
                raise BadConfig(f"{name} must be printable text of at most 1024 characters, or null")

    def rank_for(self, module: str) -> int:
        """r of one module path."""
        return next((r for key, r in self.rank_pattern.items() if _matches(module, key)), self.r)

    def scaling_for(self, module: str) -> float:
        """α/r of one module path, or α/√r with rank-stabilised LoRA (arXiv:2312.03732)."""
        alpha = next((a for key, a in self.alpha_pattern.items() if _matches(module, key)), self.lora_alpha)
        r = self.rank_for(module)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_peft_json(self) -> bytes:
        """`adapter_config.json` as PEFT reads it: equal configurations give equal bytes."""
        document: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.target_modules != ALL_LINEAR:
            document["target_modules"] = sorted(self.target_modules)
        document |= {"modules_to_save": None, "peft_type": "LORA", "inference_mode": True, "auto_mapping": None}
        document |= {"layers_pattern": None, "layers_to_transform": None}  # read by PEFT before 0.18
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_peft_json(cls, data: bytes) -> Self:
        """Parse `adapter_config.json`; anything that would change the arithmetic and is not done here is refused."""
        if len(data) > MAX_CONFIG_BYTES:
            raise BadConfig(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes")
        try:
            document = strict_json.loads(data)
        except ValueError as error:
            raise BadConfig(f"adapter_config.json is {error}") from None
        if not isinstance(document, dict):
            raise BadConfig("adapter_config.json must hold one object")
        if document.get("peft_type") != "LORA":
            raise BadConfig(f'peft_type must be "LORA", not {document.get("peft_type")!r}')
        if missing := sorted({"r", "lora_alpha", "target_modules"} - document.keys()):
            raise BadConfig(f"adapter_config.json lacks {', '.join(missing)}")
        known = {item.name for item in fields(cls)}
        for name in sorted(document.keys() - known - _WITHOUT_EFFECT):
            if document[name]:
                raise BadConfig(f"{name[:80]} is not supported here, and this adapter sets it")
        given = {name: value for name, value in document.items() if name in known}
        given["modules_to_save"] = _tuple(given.get("modules_to_save") or ())
        given["target_modules"] = _tuple(given["target_modules"])
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given.get(name) or {}
        if given.get("task_type", "") is None:
            del given["task_type"]
        return cls(**given)


def match_targets(config: LoraConfig, module_names: Iterable[str]) -> list[str]:
    """The linear modules that `config` adapts, sorted, by PEFT's rule: the whole path or a dotted suffix.

    "all-linear" is every one but the output layer. A target that matches nothing is an UnknownTargetModules.
    """
    names = sorted(module_names)
    if config.target_modules == ALL_LINEAR:
        return [name for name in names if not _matches(name, OUTPUT_LAYER)]
    unknown = [t for t in config.target_modules if not any(_matches(name, t) for name in names)]
    if unknown:
        available = sorted({name.rpartition(".")[2] for name in names})
        raise UnknownTargetModules(
            f"the base model has no linear module named {', '.join(unknown)}; it has {', '.join(available)}",
            unknown=unknown,
            available=available,
        )
    return [name for name in names if any(_matches(name, target) for target in config.target_modules)]


def _matches(module: str, suffix: str) -> bool:
    return module == suffix or module.endswith("." + suffix)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise BadConfig(f"{name} must be a whole number from 1 to {MAX_RANK}, not {value!r}")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1e9:
        raise BadConfig(f"{name} must be a number above 0 and at most 1e9, not {value!r}")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _targets(value: Any) -> Any:
    if value == ALL_LINEAR:
        return value
    if isinstance(value, str):
        raise BadConfig(f'target_modules must be a list of module names or "all-linear", not {value[:80]!r}')
    if not isinstance(value, tuple) or not 1 <= len(value) <= 10_000:
        raise BadConfig("target_modules must be a list of 1 to 10000 module names")
    for name in value:
        _check_path("target_modules", name)
    return tuple(sorted(set(value)))


def _pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or len(value) > 10_000:
        raise BadConfig(f"{name} must map at most 10000 module names to numbers")
    for key, item in value.items():
        _check_path(name, key)
        check(f"{name}[{key!r}]", item)
    return dict(sorted(value.items()))


def _check_path(name: str, value: Any) -> None:
    # PEFT reads some of these as regular expressions; a plain dotted path means the same to both.
    if not isinstance(value, str) or len(value) > 256 or not _MODULE_PATH.fullmatch(value):
        raise BadConfig(f"{name} holds {str(value)[:80]!r}, which is not a dotted module name")
