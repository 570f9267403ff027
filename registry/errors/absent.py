"""Things that are not there. Another tenant's id answers exactly like one that does not exist."""

from registry.errors.families import NotFound


class CheckpointNotFound(NotFound):
    """This job has no such checkpoint, or it is not kept any more."""

    code = "checkpoint_not_found"


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
