"""What can be wrong with an adapter, a base model, a data set or a run. Each class has a stable `code`."""

from typing import Any, ClassVar


class LoraError(Exception):
    """Something given to lora_core cannot be used. `message` is a sentence that says how to fix it."""

    code: ClassVar[str] = "lora_error"

    def __init__(self, message: str, **details: Any) -> None:
        self.message = message
        self.details = details
        super().__init__(message)


class BadConfig(LoraError):
    """A LoRA or training setting is out of range, or asks for something this library does not do."""

    code = "bad_config"


class BadHeader(LoraError):
    """A file is not a well-formed safetensors file."""

    code = "bad_header"


class BadBase(LoraError):
    """A folder is not a base model that can be trained and merged here."""

    code = "invalid_base_model"


class BadAdapter(LoraError):
    """A folder is not a usable LoRA adapter."""

    code = "invalid_adapter"


class BadRecipe(LoraError):
    """A stored merge recipe is not one that this release wrote."""

    code = "invalid_recipe"


class DigestMismatch(LoraError):
    """A file that was made is not the one that was expected."""

    code = "digest_mismatch"


class NotFaithful(LoraError):
    """A merged model is not what its base and adapter are together."""

    code = "merge_not_faithful"


class KeyMismatch(LoraError):
    """Tensor names of an adapter and of a base model do not fit one to one."""

    code = "key_mismatch"


class ShapeMismatch(LoraError):
    """A tensor has another shape than its place in the model."""

    code = "shape_mismatch"


class DifferentBases(LoraError):
    """Adapters of different base models were to be made one."""

    code = "different_bases"


class UnknownAdapter(LoraError):
    """No adapter of this name is loaded."""

    code = "unknown_adapter"


class NonFinite(LoraError):
    """A number is NaN or infinite."""

    code = "non_finite"


class TrainingDiverged(NonFinite):
    """The loss or a gradient became NaN or infinite during training."""

    code = "training_diverged"


class BadCheckpoint(LoraError):
    """A folder is not a whole, undamaged checkpoint that this release can read."""

    code = "invalid_checkpoint"


class CheckpointMismatch(LoraError):
    """A checkpoint belongs to another run: going on from it would mix two."""

    code = "checkpoint_mismatch"


class NoGradient(LoraError):
    """An adapter tensor received no gradient: training would not change it."""

    code = "no_gradient"


class UnknownTargetModules(LoraError):
    """A target module does not exist in the base model; `details["available"]` lists what does."""

    code = "unknown_target_modules"


class DatasetError(LoraError):
    """The training rows cannot be trained on; `details["errors"]` says which and why."""

    code = "invalid_training_file"


class NothingToLearn(DatasetError):
    """No row has a trained token within the length limit."""

    code = "no_trainable_tokens"
