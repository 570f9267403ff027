"""What a job is to do: validated once at submit, stored as JSON, never changed."""

import math
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lora_core.adalora_config import AdaLoraConfig
from lora_core.config import ALL_LINEAR, CHANGE_THE_START, MAX_RANK, LoraConfig
from lora_core.errors import BadConfig
from lora_core.merge_options import MAX_SCALE, MAX_SHARD_SIZE, MIN_SHARD_SIZE, Start
from lora_core.targets import PAPER

MergeDtype = Literal["base", "float32", "bfloat16", "float16"]


class Spec(BaseModel):
    """Frozen; unknown fields, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AdaLoraSpec(Spec):
    """PEFT's fields and defaults (arXiv:2303.10512): a rank of `init_r` everywhere becomes `target_r` on average."""

    init_r: int = Field(default=12, ge=1, le=MAX_RANK)
    target_r: int = Field(default=8, ge=1, le=MAX_RANK)
    tinit: int = Field(default=0, ge=0, le=10_000_000)
    tfinal: int = Field(default=0, ge=0, le=10_000_000)
    deltaT: int = Field(default=1, ge=1, le=10_000_000)  # noqa: N815  PEFT's name
    beta1: float = Field(default=0.85, gt=0, lt=1)
    beta2: float = Field(default=0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(default=0.5, ge=0, le=1e6)


class LoraSpec(Spec):
    """PEFT's fields. `lora_alpha` absent or null means 2·r, so that scaling is 2. With `adalora`, r is its `init_r`.

    `trainable_token_indices` are rows of the input embedding, which a tied output layer shares. `target_parameters` are
    those of experts; with them, `target_modules` may be empty. `quantization` is that of the base while it trains."""

    r: int = Field(default=16, ge=1, le=MAX_RANK)
    lora_alpha: float = Field(default=32.0, gt=0, le=1e9)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | Literal["all-linear", "paper"] = ALL_LINEAR
    exclude_modules: list[str] = []
    layers_to_transform: list[int] = []
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] = []
    trainable_token_indices: list[int] = []
    target_parameters: list[str] = []
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    adalora: AdaLoraSpec | None = None
    quantization: Literal["nf4"] | None = None

    @model_validator(mode="before")
    @classmethod
    def alpha_follows_r(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("adalora") is not None:
            data = {**data, "r": _initial_rank(data)}
        if data.get("lora_alpha") is not None:
            return data
        r = data.get("r", cls.model_fields["r"].default)
        return {**data, "lora_alpha": 2 * r if isinstance(r, int) and r > 0 else 1}  # a wrong r is reported as r

    @model_validator(mode="after")
    def library_accepts_it(self) -> Self:
        try:
            self.config()
        except BadConfig as error:
            raise ValueError(error.message) from None  # what pydantic collects
        if self.may_double() and 2 * max(self.r, *self.rank_pattern.values(), 1) > MAX_RANK:
            raise ValueError(f"such an adapter has twice the rank when it is saved, and that is at most {MAX_RANK}")
        return self

    @model_validator(mode="after")
    def adalora_has_factors_only(self) -> Self:
        more = {"bias": self.bias != "none", "modules_to_save": self.modules_to_save}
        more["trainable_token_indices"] = self.trainable_token_indices
        if self.adalora and (names := [name for name, given in more.items() if given]):
            raise ValueError(f"an AdaLoRA is published as a plain LoRA, which cannot hold {names[0]}; leave that out")
        return self

    def may_double(self) -> bool:
        """Whether what is saved may be a LoRA of twice the rank that was asked for."""
        return self.target_modules == PAPER or self.init_lora_weights in CHANGE_THE_START

    def config(self, *, total_steps: int = 2**31) -> LoraConfig:
        """The same settings as the library's own type, which also checks the module names. Of AdaLoRA for a training of
        so many steps."""
        targets, start = self.target_modules, self.init_lora_weights
        plan = {**self.adalora.model_dump(), "total_step": total_steps} if self.adalora else {}
        make = AdaLoraConfig if self.adalora else LoraConfig
        return make(
            **plan,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=tuple(targets) if isinstance(targets, list) else targets,
            exclude_modules=tuple(self.exclude_modules),
            layers_to_transform=tuple(self.layers_to_transform),
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            bias=self.bias,
            modules_to_save=tuple(self.modules_to_save),
            trainable_token_indices={"": tuple(self.trainable_token_indices)} if self.trainable_token_indices else {},
            target_parameters=tuple(self.target_parameters),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if start == "kaiming" else start,
        )


def _initial_rank(data: dict[str, Any]) -> Any:
    """`init_r` of `adalora`; ValueError where an `r` beside it says something else."""
    given = data["adalora"]
    field = AdaLoraSpec.model_fields["init_r"]
    init_r = given.get("init_r", field.default) if isinstance(given, dict) else getattr(given, "init_r", field.default)
    if data.get("r", init_r) != init_r:
        raise ValueError("with adalora, r means nothing: leave it out, and set init_r and target_r in adalora")
    return init_r


class TrainSpec(Spec):
    """One fine-tuning run. `batch_size` counts rows per optimizer step. Supervised runs imitate rows; those of `dpo`
    (arXiv:2305.18290) prefer one answer to another, and `beta` holds them to the base model."""

    method: Literal["supervised", "dpo"] = "supervised"
    beta: float = Field(default=0.1, gt=0, le=100)
    lora: LoraSpec = LoraSpec()
    n_epochs: int = Field(default=3, ge=1, le=1000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1000)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6)
    max_length: int = Field(default=2048, ge=8, le=131_072)
    seed: int = Field(default=0, ge=0, lt=2**63)
    packing: bool = True
    activation_checkpointing: bool = False
    tokens_per_batch: int = Field(default=4096, ge=1, le=2**24)
    eval_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    early_stopping_patience: int | None = Field(default=None, ge=1, le=1000)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run on so many rows."""
        steps = self.n_epochs * math.ceil(rows / self.batch_size)
        return min(steps, self.max_steps or steps)

    @model_validator(mode="before")
    @classmethod
    def preferences_are_padded(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("method") == "dpo":
            return {"packing": False, **data}
        return data

    @field_validator("packing")
    @classmethod
    def answers_are_not_packed(cls, value: bool, info: ValidationInfo) -> bool:  # noqa: FBT001  pydantic calls it so
        if value and info.data.get("method") == "dpo":
            raise ValueError("the two answers of a preference stand in rows of their own; leave packing out")
        return value


class MergeOptions(Spec):
    """Merged weights in `dtype` (`base` keeps the base model's own), the change times `scale`, shards of at most
    `shard_size` bytes of tensors (None: those of the base), and added to the base as it is or as 4 bits leave it."""

    dtype: MergeDtype = "base"
    scale: float = Field(default=1.0, ge=-MAX_SCALE, le=MAX_SCALE)
    shard_size: int | None = Field(default=None, ge=MIN_SHARD_SIZE, le=MAX_SHARD_SIZE)
    start: Start = "original"


class MergeSpec(MergeOptions):
    """Fold one version into its base model."""

    version_id: Annotated[uuid.UUID, Field(strict=False)]  # text in the stored JSON
