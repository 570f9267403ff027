"""Requests that are well formed but cannot be carried out as written."""

from registry.errors.families import Invalid


class UnknownBaseModel(Invalid):
    """No base model has this name. Register one with `lora-depot base add NAME --from PATH`."""

    code = "unknown_base_model"


class UnknownTrainingFile(Invalid):
    """No file with this id and purpose `fine-tune` exists. Upload it with `POST /v1/files` first."""

    code = "unknown_file"


class WrongRows(Invalid):
    """The file's rows are not what the method learns from. `supervised` needs messages, prompt and completion, or text;
    `dpo` needs preferences."""

    code = "wrong_rows"


class UnknownBaseFile(Invalid):
    """No file with this id and purpose `base-model` exists. Upload it with `POST /v1/files` first."""

    code = "unknown_base_file"


class UnknownTargetModules(Invalid):
    """Some target modules do not exist in the base model."""

    code = "unknown_target_modules"


class UnknownQueue(Invalid):
    """No worker serves this queue."""

    code = "unknown_queue"


class NoSuggestion(Invalid):
    """There is no suggested patch for this job: no rule knows a setting that would help. Send a patch of your own."""

    code = "no_suggestion"


class WebhookNotAllowed(Invalid):
    """Webhooks are sent to https addresses on the public internet. The operator can allow others."""

    code = "webhook_not_allowed"


class WebhookUnreachable(Invalid):
    """Nobody answered at the webhook's address within five seconds; `details.reason` says why."""

    code = "webhook_unreachable"


class InvalidHyperparameter(Invalid):
    """A hyper-parameter is out of range."""

    code = "invalid_hyperparameter"


class InvalidTrainingFile(Invalid):
    """The training file has lines that cannot be trained on."""

    code = "invalid_training_file"


class InvalidBaseModel(Invalid):
    """These files are not a base model this service can train."""

    code = "invalid_base_model"


class InvalidName(Invalid):
    """Names are 1–128 characters of a–z, 0–9, dot, dash and underscore, starting with a letter or digit."""

    code = "invalid_name"


class InvalidAliasName(InvalidName):
    """Aliases are 1–64 characters of a–z, 0–9, dot, dash and underscore, starting with a letter."""

    code = "invalid_alias_name"


class InvalidBaseModelName(InvalidName):
    """Base models are named `NAME` or `ORG/NAME`: each part 1–96 letters, digits, dots, dashes or underscores."""

    code = "invalid_base_model_name"


class InvalidSource(Invalid):
    """`source` is at most 512 printable characters; `revision` is a resolved commit, 40 or 64 hex digits."""

    code = "invalid_source"


class InvalidFilename(Invalid):
    """File names are 1–255 characters without slashes or control characters."""

    code = "invalid_filename"


class AliasReserved(Invalid):
    """This alias is reserved: `latest`, all digits, and `v` followed by digits name versions. Choose another."""

    code = "alias_reserved"


class InvalidCursor(Invalid):
    """The `after` value does not belong to this list. Start again without it."""

    code = "invalid_cursor"


class InvalidIdempotencyKey(Invalid):
    """`Idempotency-Key` must be 1–255 visible ASCII characters."""

    code = "invalid_idempotency_key"


class IdempotencyKeyReused(Invalid):
    """This `Idempotency-Key` was used with another request body. Use a new key for a new request."""

    code = "idempotency_key_reused"


class AdapterNameMissing(Invalid):
    """Name the adapter this job publishes to: `lora.adapter`, or `suffix`."""

    code = "adapter_name_missing"


class BaseModelMismatch(Invalid):
    """This adapter was trained on another base model, and all its versions share it. Choose another adapter name."""

    code = "base_model_mismatch"
