"""What only HTTP can get wrong: errors that have no meaning below this room."""

from registry.errors import DepotError, Invalid, LimitReached, NotFound, TooLarge, Unavailable


class BadRequest(DepotError):
    """The request cannot be read."""

    code = "bad_request"


class InvalidJson(BadRequest):
    """The body is not JSON."""

    code = "invalid_json"


class JsonTooDeep(BadRequest):
    """The body is nested more than 32 levels deep. Flatten it."""

    code = "json_too_deep"


class InvalidEncoding(BadRequest):
    """Text in a request is UTF-8 without NUL characters."""

    code = "invalid_encoding"


class InvalidMultipart(BadRequest):
    """The body is not multipart/form-data with the fields `file` and `purpose`."""

    code = "invalid_multipart"


class AmbiguousCredentials(BadRequest):
    """The request has more than one `Authorization` header. Send one."""

    code = "ambiguous_credentials"


class InvalidRange(BadRequest):
    """The `Range` header cannot be read. Write `bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-COUNT`."""

    code = "invalid_range"


class RouteNotFound(NotFound):
    """There is no such address here. `/docs` lists every one."""

    code = "route_not_found"


class ModelNotFound(NotFound):
    """There is no model with this name. List them with `GET /v1/models`."""

    code = "model_not_found"


class MethodNotAllowed(DepotError):
    """This address exists, but not for this method; the `Allow` header lists those it has."""

    code = "method_not_allowed"


class BodyTimeout(DepotError):
    """The body stopped arriving. Send it again."""

    code = "body_timeout"


class BodyTooLarge(TooLarge):
    """The body is larger than 1 MiB. Large things are uploaded with `POST /v1/files`."""

    code = "body_too_large"


class TooManyStreams(LimitReached):
    """This key already holds as many event streams open as it may. Close one, or poll the events."""

    code = "too_many_streams"


class UrlTooLong(DepotError):
    """The address is longer than 8 KiB."""

    code = "url_too_long"


class HeadersTooLarge(DepotError):
    """The headers are more than 100, or longer than 8 KiB each or 16 KiB together."""

    code = "headers_too_large"


class UnsupportedMediaType(DepotError):
    """Send the body with `Content-Type: application/json`."""

    code = "unsupported_media_type"


class UnsupportedEncoding(UnsupportedMediaType):
    """Send the body as it is: compressed requests (`Content-Encoding`) are not read."""

    code = "unsupported_content_encoding"


class RangeNotSatisfiable(DepotError):
    """The `Range` starts behind the end; `Content-Range` says how long the file is."""

    code = "range_not_satisfiable"


class NotReady(Unavailable):
    """A part this service needs does not answer or is not migrated; `details.failed` names it."""

    code = "not_ready"


# ── bodies and parameters that are JSON but not what the route takes ─────────────────────────────


class UnknownField(Invalid):
    """The body has a field this route does not know."""

    code = "unknown_field"


class UnknownParameter(Invalid):
    """The query has a parameter this route does not know."""

    code = "unknown_parameter"


class MissingField(Invalid):
    """A required field is missing."""

    code = "missing_field"


class InvalidType(Invalid):
    """A field has the wrong type."""

    code = "invalid_type"


class InvalidValue(Invalid):
    """A field has a value that is not allowed."""

    code = "invalid_value"


class InvalidPatch(Invalid):
    """The patch does not fit the job's request."""

    code = "invalid_patch"


class InvalidLimit(Invalid):
    """`limit` is out of range."""

    code = "invalid_limit"
