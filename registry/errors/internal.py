"""What only the depot itself hears of, and damage."""

from registry.errors.families import DepotError


class FenceLost(DepotError):
    """Another worker owns this job now; whatever this one does is ignored."""

    code = "fence_lost"


class CancelRequested(DepotError):
    """The job is being cancelled; nothing of it may be published."""

    code = "cancel_requested"


class ArtifactCorrupt(DepotError):
    """Stored bytes do not match the digest that Postgres holds for them; they are never served."""

    code = "artifact_corrupt"


class ObjectMissing(DepotError):
    """An object that Postgres names is not in the store; its bytes were removed behind the service's back."""

    code = "object_missing"
