"""`AdaLoraConfig` and PEFT's `adapter_config.json` of AdaLoRA (arXiv:2303.10512), without torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from lora_core import config_fields, strict_json
from lora_core.config import LoraConfig
from lora_core.errors import BadConfig

_EPSILON = 1e-5  # PEFT's, below every scaling
_EXCLUDED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_parameters")


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
    """A LoRA that starts with rank `init_r` everywhere and ends with `target_r` on average; `r` means nothing.

    Of `total_step` steps the first `tinit` keep every rank and the last `tfinal` the final ones; between them every
    `deltaT`-th step leaves the ranks that the budget allows. `beta1` and `beta2` smooth importance and its
    uncertainty, `orth_reg_weight` times the distance from orthogonal factors is added to the loss. `kept` says of
    each pruned module, by its path, which of its first `init_r` triplets are left.
    """

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_r", "target_r"):
            config_fields.check_rank(name, getattr(self, name))
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("total_step", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise BadConfig(f"{name} must be a whole number of steps from {least}, not {getattr(self, name)!r}")
        if self.target_r > self.init_r:
            raise BadConfig(f"target_r must be at most init_r = {self.init_r}, not {self.target_r}")
        if self.tinit + self.tfinal >= self.total_step:
            raise BadConfig("tinit and tfinal leave no step of total_step in which ranks could be taken away")
        for name in ("beta1", "beta2"):
            if not config_fields.is_number(getattr(self, name)) or not 0 < getattr(self, name) < 1:
                raise BadConfig(f"{name} must be between 0 and 1, not {getattr(self, name)!r}")
        if not config_fields.is_number(self.orth_reg_weight) or self.orth_reg_weight < 0:
            raise BadConfig(f"orth_reg_weight must be a number from 0, not {self.orth_reg_weight!r}")
        for name in _EXCLUDED:
            if getattr(self, name):
                raise BadConfig(f"{name} means nothing to AdaLoRA")
        if self.init_lora_weights is not True:
            raise BadConfig("init_lora_weights must be true: AdaLoRA has its own start")
        self._check_kept()

    def _check_kept(self) -> None:
        for path, kept in self.kept.items():
            config_fields.check_path("rank_pattern", path)
            if len(kept) != self.init_r or not all(isinstance(item, bool) for item in kept):
                raise BadConfig(f"rank_pattern of {path} must be {self.init_r} times true or false")

    def rank_for(self, module: str) -> int:
        """What is left of init_r in one module; 0 if nothing is."""
        return sum(self.kept[module]) if module in self.kept else self.init_r

    def scaling_for(self, module: str) -> float:  # noqa: ARG002  the same for every module
        """The factor of lora_B · diag(lora_E) · lora_A: the rank it began with counts, pruned or not."""
        return self.lora_alpha / (self.init_r + _EPSILON)

    def to_peft_json(self) -> bytes:
        """`adapter_config.json` as PEFT reads it: equal configurations give equal bytes."""
        document = json.loads(super().to_peft_json()) | {"peft_type": "ADALORA"}
        del document["kept"]
        pattern = {f"{path}.lora_E": list(kept) for path, kept in self.kept.items()}
        document["rank_pattern"] = pattern or None
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_peft_json(cls, data: bytes, *, modules: Sequence[str] = ()) -> Self:
        """Parse `adapter_config.json`; anything that would change the arithmetic and is not done here is refused."""
        try:
            document = strict_json.loads(data)
        except ValueError as error:
            raise BadConfig(f"adapter_config.json is {error}") from None
        if not isinstance(document, dict) or document.get("peft_type") != "ADALORA":
            raise BadConfig('adapter_config.json must hold one object with "peft_type": "ADALORA"')
        own = {item.name for item in fields(cls)} - {item.name for item in fields(LoraConfig)}
        given = {name: document.pop(name) for name in sorted(own & document.keys())}
        if "total_step" not in given:
            raise BadConfig("adapter_config.json lacks total_step")
        given["kept"] = _kept(document.pop("rank_pattern", None))
        plain = json.dumps(document | {"peft_type": "LORA", "rank_pattern": {}}).encode()
        lora = LoraConfig.from_peft_json(plain, modules=modules)
        return cls(**{item.name: getattr(lora, item.name) for item in fields(LoraConfig)}, **given)


def _kept(pattern: Any) -> dict[str, tuple[bool, ...]]:
    if not isinstance(pattern, dict | None) or len(pattern or ()) > config_fields.MAX_NAMES:
        raise BadConfig("rank_pattern of AdaLoRA must map module names to lists")
    kept = {}
    for name, values in (pattern or {}).items():
        if not name.endswith(".lora_E") or not isinstance(values, list):
            raise BadConfig(f"rank_pattern holds {name[:80]!r}; AdaLoRA maps <module>.lora_E to a list")
        kept[name.removesuffix(".lora_E")] = tuple(values)
    return dict(sorted(kept.items()))


def read_config(data: bytes, *, modules: Sequence[str] = ()) -> LoraConfig:
    """The `LoraConfig` or `AdaLoraConfig` that an `adapter_config.json` holds."""
    try:
        document: Any = strict_json.loads(data)
    except ValueError as error:
        raise BadConfig(f"adapter_config.json is {error}") from None
    adaptive = isinstance(document, dict) and document.get("peft_type") == "ADALORA"
    return (AdaLoraConfig if adaptive else LoraConfig).from_peft_json(data, modules=modules)
