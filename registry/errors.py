"""Domain errors. Each carries a stable `code`, a sentence that says how to fix it, and the field at fault.

HTTP statuses live in `api.errors`, which maps the families below."""

from typing import Any, ClassVar


class DepotError(Exception):
    """Something went wrong in the depot."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str | None = None, *, param: str | None = None, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.details = details
        super().__init__(self.message)


# ── families: api.errors gives each one HTTP status ──────────────────────────────────────────────


class NotFound(DepotError):
    """There is no such thing here."""

    code = "not_found"


class Conflict(DepotError):
    """The state of the thing does not allow this."""

    code = "conflict"


class Invalid(DepotError):
    """The request is well formed but cannot be carried out as written."""

    code = "invalid"


class TooLarge(DepotError):
    """The upload is larger than this service accepts."""

    code = "too_large"


class LimitReached(DepotError):
    """A limit of this tenant is reached; try again later."""

    code = "limit_reached"


class Unauthenticated(DepotError):
    """Send an API key as `Authorization: Bearer <key>`."""

    code = "missing_credentials"


class CheckpointNotFound(NotFound):
    """This job has no such checkpoint, or it is not kept any more."""

    code = "checkpoint_not_found"


class CheckpointNotPublishable(Conflict):
    """This checkpoint holds no adapter that could be used: training had not changed anything yet."""

    code = "checkpoint_not_publishable"


class Unavailable(DepotError):
    """A part of the service does not answer; try again in a moment."""

    code = "unavailable"


# ── authentication ───────────────────────────────────────────────────────────────────────────────


class InvalidApiKey(Unauthenticated):
    """This API key is not valid here. Check for missing characters, or ask the operator for a new key."""

    code = "invalid_api_key"


class KeyRevoked(Unauthenticated):
    """This API key was revoked. Ask the operator for a new one."""

    code = "key_revoked"


# ── absent things; another tenant's id answers exactly like an id that does not exist ────────────


class FileNotFound(NotFound):
    """There is no file with this id. List yours with `GET /v1/files`."""

    code = "file_not_found"


class JobNotFound(NotFound):
    """There is no fine-tuning job with this id. List yours with `GET /v1/fine_tuning/jobs`."""

    code = "job_not_found"


class AdapterNotFound(NotFound):
    """There is no adapter with this name. List yours with `GET /v1/adapters`."""

    code = "adapter_not_found"


class VersionNotFound(NotFound):
    """The adapter has no such version or alias. List them with `GET /v1/adapters/{name}/versions`."""

    code = "version_not_found"


class AliasNotFound(NotFound):
    """The adapter has no such alias. Its `aliases` field lists what there is: `GET /v1/adapters/{name}`."""

    code = "alias_not_found"


class WebhookNotFound(NotFound):
    """There is no webhook endpoint with this id. List yours with `GET /v1/webhook_endpoints`."""

    code = "webhook_not_found"


class MergeNotFound(NotFound):
    """There is no merge with this id."""

    code = "merge_not_found"


class KeyNotFound(NotFound):
    """There is no API key with this id. The id is the 12 characters after `ld_`."""

    code = "key_not_found"


class ArtifactNotFound(NotFound):
    """There is no file with this name in it. The `files` field of the parent lists what there is."""

    code = "artifact_not_found"


class BaseModelNotFound(NotFound):
    """There is no base model with this name. List them with `GET /v1/base-models`."""

    code = "base_model_not_found"


# ── invalid input ────────────────────────────────────────────────────────────────────────────────


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


# ── state conflicts ──────────────────────────────────────────────────────────────────────────────


class JobTerminal(Conflict):
    """The job has already ended."""

    code = "job_terminal"


class JobCancelling(Conflict):
    """The job is being cancelled; it can neither be paused nor resumed."""

    code = "job_cancelling"


class JobNotEnded(Conflict):
    """The job has not ended yet. Wait for it, or cancel it first."""

    code = "job_not_ended"


class NameTaken(Conflict):
    """This name is already in use. Choose another."""

    code = "name_taken"


class VersionInUse(Conflict):
    """The version is in use. Move its aliases and wait for running jobs, then delete it."""

    code = "version_in_use"


class FileInUse(Conflict):
    """A job that has not ended still needs this file. Cancel the job or wait for it, then delete the file."""

    code = "file_in_use"


class MergeNotReady(Conflict):
    """The merge has not finished yet. Poll `GET /v1/merges/{id}` until its status is `succeeded`."""

    code = "merge_not_ready"


class NotMergeable(Conflict):
    """This version cannot be merged into its base model."""

    code = "not_mergeable"


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


class QuotaExceeded(LimitReached):
    """Too many jobs are queued for this tenant; wait for some to end."""

    code = "quota_exceeded"


class WebhookLimit(LimitReached):
    """There are as many webhook endpoints as a tenant may have. Delete one first."""

    code = "webhook_limit"


class FileTooLarge(TooLarge):
    """The file is larger than this service accepts."""

    code = "file_too_large"


# ── the worker's own ─────────────────────────────────────────────────────────────────────────────


class FenceLost(DepotError):
    """Another worker owns this job now; whatever this one does is ignored."""

    code = "fence_lost"


class CancelRequested(DepotError):
    """The job is being cancelled; nothing of it may be published."""

    code = "cancel_requested"


class ArtifactCorrupt(DepotError):
    """Stored bytes do not match the digest that Postgres holds for them; they are never served."""

    code = "artifact_corrupt"


class MergePreparing(Unavailable):
    """The base model is being checked before its first use here. Ask again in a moment."""

    code = "merge_preparing"


class MergesBusy(Unavailable):
    """As many merged files as this process can serve at a time are being read. Ask again in a moment."""

    code = "merges_busy"


class StorageUnavailable(Unavailable):
    """The object store does not answer."""

    code = "storage_unavailable"


# ── stored objects and the links to them ─────────────────────────────────────────────────────────


class ObjectMissing(DepotError):
    """An object that Postgres names is not in the store; its bytes were removed behind the service's back."""

    code = "object_missing"


class LinkInvalid(Unauthenticated):
    """This download link is not one that this service made. Copy it again, all of it."""

    code = "link_invalid"


class LinkExpired(Unauthenticated):
    """This download link has expired. Ask for the file again to get a new one."""

    code = "link_expired"


class BlobGone(Unavailable):
    """The uploaded bytes were cleaned up before anything referred to them. Upload them again."""

    code = "blob_gone"
