"""Routes that say who may call them. One that does not say keeps the service from starting."""

from collections.abc import Callable, Coroutine, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi._compat import ModelField
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from api.context import Depot
from api.documents import responses_of
from api.jsonbody import JsonRequest, read_json
from api.refusals import AmbiguousCredentials, UnknownParameter
from registry.db import transaction
from registry.errors import DepotError, Unauthenticated
from registry.keys import Principal, authenticate

F = TypeVar("F", bound=Callable[..., Any])


class Permission(StrEnum):
    """What a route lets its caller do. A key of this release holds all of them; `public` needs no key."""

    PUBLIC = "public"
    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    MODELS_READ = "models:read"
    BASE_MODELS_READ = "base-models:read"
    BASE_MODELS_WRITE = "base-models:write"
    ADAPTERS_READ = "adapters:read"
    ADAPTERS_WRITE = "adapters:write"
    MERGES_READ = "merges:read"
    MERGES_WRITE = "merges:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"


class GuardedRoute(APIRoute):
    """Finds out who calls before it reads the body, and refuses query parameters it does not know."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        public = permission_of(self) is Permission.PUBLIC
        parameters = {field.alias for field in query_fields(self.dependant)}

        async def guarded(request: Request) -> Response:
            if not public:
                principal = await run_in_threadpool(identify, request.headers, request.app.state.depot)
                request.state.principal = principal
                request.state.passage.key_id = principal.key_id
            check_parameters(request, parameters)
            if self.body_field is None:
                return await handle(request)
            readable = JsonRequest(request.scope, request.receive)
            readable.state.json = await read_json(readable)
            return await handle(readable)

        return guarded


def query_fields(dependant: Dependant) -> list[ModelField]:
    """The query parameters that a route reads, itself or through what it depends on."""
    inner = [field for dependency in dependant.dependencies for field in query_fields(dependency)]
    return [*dependant.query_params, *inner]


def permission_of(route: object) -> Permission | None:
    """What a route declares; None for one that declares nothing."""
    extra = getattr(route, "openapi_extra", None) or {}
    word = extra.get("x-permission")
    return Permission(word) if word is not None else None


def require_permissions(app: FastAPI) -> None:
    """Raises unless every route, whatever added it, is a GuardedRoute with a permission."""
    for context in iter_route_contexts(app.routes):
        if not isinstance(context.original_route, GuardedRoute) or permission_of(context) is None:
            raise RuntimeError(f"the route {context.path!r} declares no permission")


def identify(headers: Headers, depot: Depot) -> Principal:
    """Whose request this is, by its `Authorization` header and nothing else."""
    values = headers.getlist("authorization")
    if len(values) > 1:
        raise AmbiguousCredentials
    scheme, _, key = (values or [""])[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated
    with transaction(depot.sessions) as session:
        return authenticate(session, key.strip(), pepper=depot.pepper)


def check_parameters(request: Request, known: set[str]) -> None:
    """UnknownParameter for a query parameter that the route does not read; `metadata[team]` belongs to `metadata`."""
    for name in request.query_params:
        if name.partition("[")[0] not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise UnknownParameter(f"This route does not know that parameter. Allowed: {allowed}.", param=name[:80])


class Router(APIRouter):
    """An APIRouter whose routes are declared with everything that their documentation and guard need."""

    def __init__(self, tag: str, prefix: str = "/v1") -> None:
        super().__init__(prefix=prefix, tags=[tag], route_class=GuardedRoute)

    def declare(
        self,
        method: str,
        path: str,
        *,
        permission: Permission,
        summary: str,
        returns: Any = None,
        raises: Sequence[type[DepotError]] = (),
        status: int = 200,
        extra: dict[str, Any] | None = None,
        **options: Any,
    ) -> Callable[[F], F]:
        """Declares a route. `returns` is its response model, `raises` what it may refuse with besides the usual.

        Further options go to FastAPI as they are."""
        security: list[dict[str, list[str]]] = [] if permission is Permission.PUBLIC else [{"key": []}]
        documented = responses_of(
            returns, raises, status=status, public=permission is Permission.PUBLIC, body=method in {"POST", "PUT"}
        )
        documented.update(options.pop("responses", {}))
        return self.api_route(
            path,
            methods=[method],
            response_model=returns,
            status_code=status,
            summary=summary,
            responses=documented,
            openapi_extra={"x-permission": permission.value, "security": security, **(extra or {})},
            **options,
        )
