"""The body of `POST /v1/fine_tuning/jobs`, and what it asks the trainer to do."""

import re
import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from api.json_patch import Operation
from api.schemas import Body
from api.validation import wanted
from registry.errors import AdapterNameMissing, InvalidHyperparameter
from registry.jobs.placement import Placement
from registry.jobs.spec import LoraSpec, TrainSpec

Auto = Literal["auto"]
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
CREATE = {
    "model": "Qwen/Qwen3-0.6B",
    "training_file": "file-6b1f0c2d9a7e4f53b8d21c0a9e4f7d13",
    "suffix": "support-bot",
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "depot": {"priority": 50},
    "metadata": {"team": "support"},
}


class HyperparametersIn(Body):
    """`auto` or absent means this service's defaults: 3 epochs, 8 rows per step, multiplier 1."""

    batch_size: int | Auto | None = None
    learning_rate_multiplier: float | Auto | None = None
    n_epochs: int | Auto | None = None


class SupervisedIn(Body):
    hyperparameters: HyperparametersIn | None = None


class DpoHyperparametersIn(HyperparametersIn):
    beta: float | Auto | None = Field(default=None, description="Holds the model to its base; above 0. Default 0.1")


class DpoIn(Body):
    hyperparameters: DpoHyperparametersIn | None = None


class MethodIn(Body):
    """`supervised` imitates the rows; `dpo` learns from rows that prefer one answer to another."""

    type: Literal["supervised", "dpo"]
    supervised: SupervisedIn | None = None
    dpo: DpoIn | None = None

    @model_validator(mode="after")
    def settings_are_of_the_type(self) -> Self:
        if (self.supervised if self.type == "dpo" else self.dpo) is not None:
            raise ValueError(f"given with settings under `{self.type}` only")
        return self


class AdaLoraIn(Body):
    """AdaLoRA (arXiv:2303.10512), in PEFT's words and with its defaults."""

    init_r: int | None = Field(default=None, description="Rank of each module at the start. Default 12")
    target_r: int | None = Field(default=None, description="Mean rank of the modules at the end. Default 8")
    tinit: int | None = Field(default=None, description="Steps before the first rank is taken away. Default 0")
    tfinal: int | None = Field(default=None, description="Steps after the last one is. Default 0")
    deltaT: int | None = Field(default=None, description="Steps between two decisions. Default 1")  # noqa: N815  PEFT's
    beta1: float | None = Field(default=None, description="Smooths the importance. Default 0.85")
    beta2: float | None = Field(default=None, description="Smooths its uncertainty. Default 0.85")
    orth_reg_weight: float | None = Field(default=None, description="Keeps the factors orthogonal. Default 0.5")


class LoraIn(Body):
    """LoRA settings, in PEFT's words. What is absent or null takes the default that the job object then shows."""

    adapter: str | None = Field(default=None, description="Name of the adapter to publish to; default: from `suffix`")
    r: int | None = Field(default=None, description="Rank, 1 or more. Default 16")
    lora_alpha: float | None = Field(default=None, description="Scaling is lora_alpha / r. Default 2·r")
    lora_dropout: float | None = Field(default=None, description="0 ≤ p < 1. Default 0")
    target_modules: list[str] | Literal["all-linear", "paper"] | None = Field(
        default=None,
        description="Suffixes of modules of the base model, or `paper`: query and value. Default `all-linear`",
    )
    exclude_modules: list[str] | None = Field(default=None, description="Suffixes of modules to leave alone")
    layers_to_transform: list[int] | None = Field(default=None, description="Numbers of layers. Default: all")
    rank_pattern: dict[str, int] | None = Field(default=None, description="Suffix of modules → their own rank")
    alpha_pattern: dict[str, float] | None = Field(default=None, description="Suffix of modules → their own lora_alpha")
    bias: Literal["none", "all", "lora_only"] | None = Field(
        default=None, description="Which biases to train. Default none"
    )
    modules_to_save: list[str] | None = Field(default=None, description="Suffixes of modules to train whole")
    trainable_token_indices: list[int] | None = Field(default=None, description="Tokens whose embeddings are trained")
    target_parameters: list[str] | None = Field(
        default=None, description="Parameters of experts to adapt, such as mlp.experts.gate_up_proj"
    )
    use_rslora: bool | None = Field(default=None, description="Scale by lora_alpha / √r instead. Default false")
    use_dora: bool | None = Field(default=None, description="Train magnitudes apart from directions. Default false")
    init_lora_weights: Literal["kaiming", "gaussian", "pissa", "olora"] | None = Field(
        default=None, description="How lora_A starts. Default `kaiming`"
    )
    adalora: AdaLoraIn | None = Field(default=None, description="Move ranks to where they matter; instead of `r`")
    quantization: Literal["nf4"] | None = Field(default=None, description="QLoRA: train on the base in 4 bits")
    learning_rate: float | None = Field(default=None, description="Before the multiplier. Default 2e-4")
    loraplus_lr_ratio: float | None = Field(default=None, description="LoRA+: lora_B's rate over that of lora_A")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_length: int | None = Field(default=None, description="Tokens per row; longer rows are cut. Default 2048")
    max_steps: int | None = Field(default=None, description="Stop after so many optimizer steps. Default: no limit")
    eval_steps: int | None = Field(
        default=None, description="Evaluate on the validation file every so many steps. Default: at the ends of epochs"
    )
    early_stopping_patience: int | None = Field(
        default=None, description="So many evaluations without a new best loss end the run. Default: it is not ended"
    )
    packing: bool | None = Field(default=None, description="Rows share a row without padding. Default true; not of dpo")
    activation_checkpointing: bool | None = Field(
        default=None, description="Keep fewer activations and compute them again. Default false"
    )
    tokens_per_batch: int | None = Field(default=None, description="Tokens in memory at once. Default 4096")


class DepotIn(Body):
    """How the job is scheduled. What is absent or null takes the default."""

    priority: int | None = Field(default=None, ge=0, le=200, description="The lower, the earlier. Default 100")
    queue: str | None = Field(
        default=None, pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="Which workers may take it. Default `default`"
    )
    deadline_seconds: int | None = Field(
        default=None, ge=60, le=30 * 24 * 3600, description="The longest it may wait in the queue. Default 7 days"
    )


class RetryIn(Body):
    """What to change; an absent or null `patch` repeats the request as it was."""

    patch: Literal["suggested"] | Annotated[list[Operation], Field(min_length=1, max_length=50)] | None = None


class JobCreate(Body):
    """OpenAI's request; `lora` and `depot` are this service's own. Unknown fields are refused, at every depth."""

    model: str = Field(description="Name of a base model")
    training_file: str = Field(description="Id of a file with purpose `fine-tune`")
    validation_file: str | None = None
    method: MethodIn | None = None
    hyperparameters: HyperparametersIn | None = Field(default=None, description="Deprecated: use `method`")
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, description="Generated, and shown in the job, when absent")
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        default=None, description="Not supported: null or an empty list"
    )
    lora: LoraIn = LoraIn()
    depot: DepotIn = DepotIn()

    def placement(self, *, deadline_seconds: int) -> Placement:
        """Where the job waits; `deadline_seconds` is the service's own default."""
        return Placement(**{"deadline_seconds": deadline_seconds, **self.depot.model_dump(exclude_none=True)})

    def adapter_name(self) -> str:
        """`lora.adapter`, else the suffix in the grammar of adapter names; AdapterNameMissing."""
        if self.lora.adapter is not None:
            return self.lora.adapter
        name = _NOT_IN_NAMES.sub("-", (self.suffix or "").lower()).strip("._-")
        if not name:
            raise AdapterNameMissing(param="lora.adapter")
        return name

    def spec(self) -> TrainSpec:
        """The run this body asks for; InvalidHyperparameter names the field of the body that is out of range."""
        given = self.lora.model_dump(exclude_none=True, exclude={"adapter"})
        lora = {name: given.pop(name) for name in LORA_FIELDS if name in given}
        numbers, where = self._hyperparameters()
        rate = given.get("learning_rate", TrainSpec.model_fields["learning_rate"].default)
        values: dict[str, Any] = {
            **given,
            "method": self.method.type if self.method else "supervised",
            "lora": lora,
            "learning_rate": rate * numbers.pop("learning_rate_multiplier", 1.0),
            "seed": secrets.randbelow(2**31) if self.seed is None else self.seed,
            **numbers,
        }
        try:
            return TrainSpec.model_validate(values)
        except ValidationError as error:
            raise _out_of_range(error, where) from None

    def _hyperparameters(self) -> tuple[dict[str, Any], str]:
        """The numbers given, without `auto`, and where in the body they stand."""
        settings = (self.method.dpo or self.method.supervised) if self.method else None
        if self.method is not None and settings is not None and settings.hyperparameters is not None:
            found: HyperparametersIn = settings.hyperparameters
            where = f"method.{self.method.type}.hyperparameters"
        else:
            found, where = self.hyperparameters or HyperparametersIn(), "hyperparameters"
        return {name: value for name, value in found.model_dump(exclude_none=True).items() if value != "auto"}, where


LORA_FIELDS = tuple(LoraSpec.model_fields)


def _out_of_range(error: ValidationError, hyperparameters: str) -> InvalidHyperparameter:
    finding = error.errors(include_url=False)[0]
    path = [str(step) for step in finding["loc"]]
    if path[0] in {"n_epochs", "batch_size", "beta"}:
        path = [hyperparameters, *path]
    elif path[0] not in {"lora", "seed"}:
        path = ["lora", *path]
    name = ".".join(path[: 3 if path[1:2] == ["adalora"] else 2] if path[0] == "lora" else path)
    ends = wanted(finding)
    message = f"`{name}` must be {ends}. Change it and send the request again."
    if name == "lora.learning_rate":
        message = f"`{name}` times `learning_rate_multiplier` must be {ends}. Change either one."
    return InvalidHyperparameter(message if ends else f"`{name}` is not valid: {finding['msg']}.", param=name)
