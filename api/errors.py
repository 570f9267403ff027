"""One table from families of errors to HTTP statuses, and the one shape in which clients see them."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from api import refusals
from api.validation import explain
from registry import errors
from registry.errors import DepotError

log = logging.getLogger(__name__)

# Looked up along the class's ancestors: the nearest entry wins.
STATUS: dict[type[DepotError], int] = {
    DepotError: 500,
    errors.Invalid: 422,
    errors.InvalidCursor: 400,
    errors.InvalidIdempotencyKey: 400,
    errors.Unauthenticated: 401,
    errors.LinkInvalid: 403,
    errors.LinkExpired: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.LimitReached: 429,
    errors.Unavailable: 503,
    refusals.BadRequest: 400,
    refusals.MethodNotAllowed: 405,
    refusals.BodyTimeout: 408,
    refusals.UrlTooLong: 414,
    refusals.UnsupportedMediaType: 415,
    refusals.RangeNotSatisfiable: 416,
    refusals.HeadersTooLarge: 431,
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# What a client cannot mend and should not see: the message of these never leaves the log.
INTERNAL = "Something went wrong here, and the log has it under this request's id. Try again, or tell the operator."


def status_of(error: type[DepotError]) -> int:
    """The HTTP status of an error, by its nearest family."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def type_of(status: int) -> str:
    """OpenAI's `type` word for a status."""
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def body_of(error: DepotError) -> dict[str, Any]:
    """The error as JSON; an internal one keeps its code and says nothing else."""
    status = status_of(type(error))
    shown: dict[str, Any] = {
        "message": INTERNAL if status == 500 else error.message,
        "type": type_of(status),
        "param": error.param,
        "code": error.code,
    }
    if error.details and status != 500:
        shown["details"] = error.details
    return {"error": shown}


def headers_of(status: int) -> dict[str, str]:
    """What clients need to know about a refusal besides its body."""
    if status == 401:
        return {"www-authenticate": "Bearer"}
    if status == 409:
        # The stock client repeats every 409; a state conflict does not go away by asking again.
        return {"x-should-retry": "false"}
    if status == 503:
        return {"retry-after": "2"}
    return {}


def respond(error: DepotError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that tells a client about `error`."""
    status = status_of(type(error))
    return JSONResponse(body_of(error), status_code=status, headers={**headers_of(status), **(headers or {})})


def translate(error: Exception) -> DepotError | None:
    """The domain error an exception stands for; None when it is a bug."""
    if isinstance(error, DepotError):
        return error
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        return errors.Unavailable("The database does not answer; try again in a moment.")
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return errors.Unavailable("The database does not answer; try again in a moment.")
    return None


def on_domain_error(request: Request, error: Exception) -> JSONResponse:
    """Any error that `translate` knows."""
    known = translate(error)
    if known is None:
        raise error
    if status_of(type(known)) >= 500:
        # A driver's error without SQLAlchemy's wrapping: that would quote the statement and its values.
        reason = str(getattr(error, "orig", error)).strip()[:300]
        facts = {"request_id": request.state.passage.request_id, "code": known.code, "reason": reason}
        log.error("request failed", extra={**facts, "details": known.details or None})
    return respond(known)


def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body or parameter that is not what the route takes."""
    if not isinstance(error, RequestValidationError):
        raise error
    return respond(explain(request, error))


def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What Starlette itself refuses: unknown addresses, wrong methods, unreadable bodies."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        return respond(refusals.RouteNotFound())
    if error.status_code == 405:
        return respond(refusals.MethodNotAllowed(), {"allow": ", ".join(sorted(methods_at(request)))})
    return respond(refusals.BadRequest(str(error.detail)))


def methods_at(request: Request) -> set[str]:
    """Every method that this address has; the router itself only knows those of the first route that fits."""
    routes = iter_route_contexts(request.app.routes)
    return {
        method for route in routes if route.path_regex.match(request.scope["path"]) for method in route.methods or ()
    }


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]] = {
    DepotError: on_domain_error,
    OperationalError: on_domain_error,
    InterfaceError: on_domain_error,
    DBAPIError: on_domain_error,
    PoolTimeout: on_domain_error,
    RequestValidationError: on_validation_error,
    HTTPException: on_http_error,
}
