"""`LoraConfig` and PEFT's `adapter_config.json`, without torch. Field names are PEFT's."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Self

from lora_core import config_fields, strict_json, targets
from lora_core.errors import BadConfig, UnknownTargetModules
from lora_core.targets import (
    OUTPUT_LAYER,
    PRESETS,
    ends,
    is_in_layers,
    lookup,
    matches,
    names_of,
    query_and_value,
)

ALL_LINEAR: Final = targets.ALL_LINEAR
MAX_RANK = config_fields.MAX_RANK
MAX_CONFIG_BYTES = 2**20
# Heads of classifiers, which start at random and are therefore always trained whole. PEFT adds both names by itself.
CLASSIFIER_HEADS = ("classifier", "score")
# Starts from the base's own principal directions, which is therefore trained without them.
CHANGE_THE_START = ("pissa", "olora")
# PEFT has laid out the factors of experts as the module says since then.
EXPERTS_SINCE = (0, 19, 1)
TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION", "QUESTION_ANS")

# Written by PEFT with a value that is not "empty" and that means nothing for a plain LoRA. `ensure_weight_tying` is how
# both sides of a tie came to be equal; the file holds both.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_type", "peft_version"),
        "qalora_group_size",
    }
)
_UNKNOWN_TO_OLDER_READERS = ("lora_bias", "exclude_modules", "trainable_token_indices", "target_parameters", "use_dora")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter is made of. Construction validates; every error is a `BadConfig` that names the field.

    `target_modules` are names by PEFT's rule (`lora_core.targets.matches`), or "all-linear": every linear layer but
    the output layer, or "paper": query and value projections. Patterns map such names to a rank or α of their own;
    the first match in sorted order counts: PEFT takes the first in file order and sorts its file. `modules_to_save`
    are trained whole, `trainable_token_indices` are rows of embeddings that are, by the embedding's name or, under
    the name "", those of the input embedding. `target_parameters` are parameters of experts. "pissa" and "olora" say
    how training starts; on disk such an adapter is a plain LoRA of twice the rank (`lora_core.principal`).
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear", "paper"] = ALL_LINEAR
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self) -> None:
        config_fields.check_rank("r", self.r)
        config_fields.check_alpha("lora_alpha", self.lora_alpha)
        if not config_fields.is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise BadConfig(f"lora_dropout must be a number from 0 to below 1, not {self.lora_dropout!r}")
        for name in ("use_rslora", "fan_in_fan_out", "lora_bias", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise BadConfig(f"{name} must be true or false, not {getattr(self, name)!r}")
        self._check_choices()
        own: dict[str, Any] = {"target_parameters": config_fields.names("target_parameters", self.target_parameters)}
        if self.target_modules or not self.target_parameters:
            own |= {"target_modules": config_fields.targets(self.target_modules)}
        own |= {name: config_fields.names(name, getattr(self, name)) for name in ("exclude_modules", "layers_pattern")}
        own |= {"modules_to_save": config_fields.names("modules_to_save", self.modules_to_save)}
        own |= {"layers_to_transform": config_fields.layers(self.layers_to_transform)}
        own |= {"trainable_token_indices": config_fields.tokens(self.trainable_token_indices)}
        own |= {"rank_pattern": config_fields.pattern("rank_pattern", self.rank_pattern, config_fields.check_rank)}
        own |= {"alpha_pattern": config_fields.pattern("alpha_pattern", self.alpha_pattern, config_fields.check_alpha)}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        if self.bias not in ("none", "all", "lora_only"):
            raise BadConfig(f'bias must be "none", "all" or "lora_only", not {self.bias!r}')
        if self.init_lora_weights is not True and self.init_lora_weights not in ("gaussian", *CHANGE_THE_START):
            choices = ", ".join(("gaussian", *CHANGE_THE_START))
            raise BadConfig(f"init_lora_weights must be true or one of {choices}, not {self.init_lora_weights!r}")
        if self.use_dora and self.lora_bias:
            raise BadConfig("lora_bias and use_dora exclude each other: no method says what both would be")
        if self.use_dora and self.init_lora_weights in CHANGE_THE_START:
            raise BadConfig("use_dora starts from the base itself: init_lora_weights must be true or gaussian")
        if nameless := [name for name in self.target_parameters if "." not in name]:
            raise BadConfig(f"target_parameters holds {nameless[0]}; it must name the module as well")
        if self.target_parameters and (self.lora_dropout or self.use_dora or self.lora_bias or self.fan_in_fan_out):
            raise BadConfig("lora_dropout, use_dora, lora_bias and fan_in_fan_out do not go with target_parameters")
        if self.target_parameters and self.init_lora_weights in CHANGE_THE_START:
            raise BadConfig("target_parameters start as true or gaussian: experts have no principal directions here")
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise BadConfig(f"task_type must be null or one of {', '.join(TASK_TYPES)}, not {self.task_type!r}")
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and len(value) <= 1024 and value.isprintable()):
                raise BadConfig(f"{name} must be printable text of at most 1024 characters, or null")

    def rank_for(self, module: str) -> int:
        """r of one module path."""
        return lookup(self.rank_pattern, module, self.r)

    def scaling_for(self, module: str) -> float:
        """The factor of lora_B · lora_A of one module path."""
        alpha = lookup(self.alpha_pattern, module, self.lora_alpha)
        return scaling(alpha, self.rank_for(module), use_rslora=self.use_rslora)

    def saved_names(self) -> tuple[str, ...]:
        """Names of modules that are trained whole: `modules_to_save`, and of a classifier its head."""
        return self.modules_to_save + (CLASSIFIER_HEADS if self.task_type == "SEQ_CLS" else ())

    def to_peft_json(self) -> bytes:
        """`adapter_config.json` as PEFT reads it: equal configurations give equal bytes."""
        document: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _UNKNOWN_TO_OLDER_READERS:
            if not document[name]:
                del document[name]
        if self.init_lora_weights in CHANGE_THE_START:
            raise BadConfig(f"an adapter that started as {self.init_lora_weights} is not saved as such, but as a LoRA")
        if tokens := document.get("trainable_token_indices"):
            document["trainable_token_indices"] = tokens.get("", tokens)
        for name in ("modules_to_save", "layers_pattern", "layers_to_transform"):
            document[name] = document[name] or None
        document |= {"peft_type": "LORA", "inference_mode": True, "auto_mapping": None}
        if self.target_parameters:  # how their factors lie depends on it
            document["peft_version"] = ".".join(map(str, EXPERTS_SINCE))
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_peft_json(cls, data: bytes, *, modules: Sequence[str] = ()) -> Self:
        """Parse `adapter_config.json`; anything that would change the arithmetic and is not done here is refused.

        Where target_modules is a regular expression, as PEFT allows, `modules` are what it matched.
        """
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
        _refuse(document, known)
        given = {name: value for name, value in document.items() if name in known}
        given["target_modules"] = config_fields.as_tuple(given["target_modules"] or ())
        if isinstance(given["target_modules"], str) and given["target_modules"] not in PRESETS and modules:
            given["target_modules"] = tuple(modules)
        for name in ("modules_to_save", "exclude_modules", "layers_pattern", "target_parameters"):
            given[name] = config_fields.as_strings(given.get(name))
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given.get(name) or {}
            config_fields.check_order(name, given[name])
        layers = given.get("layers_to_transform")
        given["layers_to_transform"] = (layers,) if type(layers) is int else config_fields.as_tuple(layers)
        given["trainable_token_indices"] = given.get("trainable_token_indices") or {}
        if isinstance(given["trainable_token_indices"], list):
            given["trainable_token_indices"] = {"": given["trainable_token_indices"]}
        return cls(**given)


def _refuse(document: Mapping[str, Any], known: set[str]) -> None:
    for name in sorted(document.keys() - known - _WITHOUT_EFFECT):
        if document[name]:
            raise BadConfig(f"{name[:80]} is not supported here, and this adapter sets it")
    if (start := document.get("init_lora_weights")) in CHANGE_THE_START:
        raise BadConfig(f"init_lora_weights is {start}: such factors fit a changed base only")
    if document.get("target_parameters") and config_fields.version(document.get("peft_version")) < EXPERTS_SINCE:
        since = ".".join(map(str, EXPERTS_SINCE))
        raise BadConfig(f"target_parameters: before PEFT {since} factors of experts lay otherwise; merge it instead")


def scaling(alpha: float, r: int, *, use_rslora: bool) -> float:
    """α/r, or α/√r with rank-stabilised LoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def match_targets(config: LoraConfig, module_names: Iterable[str], linear: Iterable[str] | None = None) -> list[str]:
    """The modules that `config` adapts, of those named, sorted.

    "all-linear" and "paper" look among `linear`, which is every name but the output layer's if not given. Modules
    excluded or saved whole are left out. A name that matches nothing is an UnknownTargetModules.
    """
    names = sorted(module_names)
    preset = sorted(linear) if linear is not None else [name for name in names if not matches(name, OUTPUT_LAYER)]
    wanted: Sequence[str] = config.target_modules
    if config.target_modules in PRESETS:
        wanted = preset if config.target_modules == ALL_LINEAR else query_and_value(preset)
        if not wanted:
            raise _unknown([f"of the preset {config.target_modules}"], names)
    found = {end for name in names for end in ends(name)}
    if unknown := [target for target in wanted if target not in found]:
        raise _unknown(unknown, names)
    excluded, saved = set(config.exclude_modules), set(config.saved_names())
    allowed = [name for name in names if excluded.isdisjoint(ends(name)) and saved.isdisjoint(names_of(name))]
    if config.target_modules == ALL_LINEAR:
        linear_names = set(wanted)
        return [name for name in allowed if name in linear_names and _is_in_layers(config, name, "")]
    return [name for name in allowed if any(matches(name, t) and _is_in_layers(config, name, t) for t in wanted)]


def _is_in_layers(config: LoraConfig, path: str, name: str) -> bool:
    return is_in_layers(path, name, config.layers_to_transform, config.layers_pattern)


def _unknown(names: Sequence[str], existing: Iterable[str]) -> UnknownTargetModules:
    available = sorted({name.rpartition(".")[2] for name in existing})
    return UnknownTargetModules(
        f"the base model has no module to adapt named {', '.join(names)}; it has {', '.join(available)}",
        unknown=list(names),
        available=available,
    )
