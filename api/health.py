"""Whether the process lives, and whether it can do its work."""

import logging
from collections.abc import Callable
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from api.context import Depot, DepotDep
from api.documents import describe
from api.refusals import NotReady
from api.routing import Permission, Router
from api.schemas import shown
from registry.schema_version import at_head

router = Router("Service", prefix="")
log = logging.getLogger(__name__)


class Health(BaseModel):
    model_config = shown({"status": "ok"})

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    model_config = shown({"status": "ready", "checks": {"database": "ok", "store": "ok"}})

    status: Literal["ready"] = "ready"
    checks: dict[str, str]


@router.declare("GET", "/healthz", permission=Permission.PUBLIC, summary="Is the process alive?", returns=Health)
def healthz() -> Health:
    """Yes, if this answers; it looks at nothing else."""
    return Health()


@router.declare(
    "GET",
    "/readyz",
    permission=Permission.PUBLIC,
    summary="Can the service do its work?",
    returns=Readiness,
    raises=(NotReady,),
)
def readyz(depot: DepotDep) -> Readiness:
    """Asks Postgres, its migrations and the object store; 503 names those that fail."""
    checks = {name: _check(name, part, depot) for name, part in CHECKS.items()}
    failed = {name: word for name, word in checks.items() if word != "ok"}
    if failed:
        raise NotReady(failed=failed)
    return Readiness(checks=checks)


@router.declare(
    "GET",
    "/openapi.json",
    permission=Permission.PUBLIC,
    summary="This API as an OpenAPI document",
    include_in_schema=False,
    response_class=JSONResponse,
)
def document(request: Request) -> JSONResponse:
    app: FastAPI = request.app
    return JSONResponse(describe(app))


@router.declare(
    "GET",
    "/docs",
    permission=Permission.PUBLIC,
    summary="This API as a page",
    include_in_schema=False,
    response_class=HTMLResponse,
)
def docs() -> Response:
    return get_swagger_ui_html(openapi_url="/openapi.json", title="LoRA Depot")


def _check(name: str, works: Callable[[Depot], bool], depot: Depot) -> str:
    """`ok`, or a word for what is wrong. Readiness answers whatever happens to the parts."""
    try:
        return "ok" if works(depot) else "not at the newest migration: run `alembic upgrade head`"
    except Exception as error:
        log.warning("not ready", extra={"part": name, "reason": type(error).__name__})
        return "does not answer"


def _store_answers(depot: Depot) -> bool:
    depot.store.ping()
    return True


# The first of these finds out whether Postgres answers, too.
CHECKS: dict[str, Callable[[Depot], bool]] = {
    "database": lambda depot: at_head(depot.engine),
    "store": _store_answers,
}
