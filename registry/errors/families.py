"""What every domain error is, and the families that `api.errors` gives one HTTP status each."""

from typing import Any, ClassVar


class DepotError(Exception):
    """Something went wrong in the depot."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str | None = None, *, param: str | None = None, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.details = details
        super().__init__(self.message)


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


class Unavailable(DepotError):
    """A part of the service does not answer; try again in a moment."""

    code = "unavailable"
