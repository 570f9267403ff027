"""The OpenAPI document: every answer of every route, good or bad, with an example."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api import refusals
from api.errors import body_of, status_of
from api.schemas import ErrorBody, Listing
from registry import errors
from registry.errors import DepotError

ABOUT = """Train, version and ship LoRA adapters.

`/v1/files`, `/v1/fine_tuning/jobs` and `/v1/models` speak OpenAI's fine-tuning protocol: point any OpenAI client
at this service. A job takes LoRA settings in one extra object, `lora`, and publishes a version of an adapter.

Every request but the public ones carries `Authorization: Bearer <API key>`. Every error has the same shape:
a stable `code`, a `message` that says what to do, and `param`, the field at fault.
"""
_ALWAYS: tuple[type[DepotError], ...] = (refusals.UnknownParameter, errors.Unavailable, DepotError)
_WITH_KEY: tuple[type[DepotError], ...] = (
    refusals.AmbiguousCredentials,
    errors.Unauthenticated,
    errors.InvalidApiKey,
    errors.KeyRevoked,
)
_WITH_BODY: tuple[type[DepotError], ...] = (
    refusals.InvalidEncoding,
    refusals.BodyTimeout,
    refusals.BodyTooLarge,
    refusals.UnsupportedMediaType,
)


def responses_of(
    returns: Any, raises: Sequence[type[DepotError]], *, status: int, public: bool, body: bool
) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for a route: an example of its answer, and one for each error it may answer with."""
    documented: dict[int | str, dict[str, Any]] = {}
    if returns is not None:
        documented[status] = {"content": {"application/json": {"example": example_of(returns)}}}
    possible = [*raises, *(() if public else _WITH_KEY), *(_WITH_BODY if body else ()), *_ALWAYS]
    for error in dict.fromkeys(possible):
        answer = documented.setdefault(
            status_of(error),
            {"model": ErrorBody, "description": "", "content": {"application/json": {"examples": {}}}},
        )
        examples = answer["content"]["application/json"]["examples"]
        examples[error.code] = {"summary": error.code, "value": body_of(error())}
        answer["description"] = " · ".join(f"`{code}`" for code in examples)
    return documented


def example_of(model: Any) -> dict[str, Any]:
    """The example in a model's configuration; a listing's is made of its item's."""
    if issubclass(model, Listing):
        item = example_of(model.__pydantic_generic_metadata__["args"][0])
        first = item.get("id", item.get("name", item.get("ref")))
        return {"object": "list", "data": [item], "has_more": False, "first_id": first, "last_id": first}
    example: dict[str, Any] = model.model_config["json_schema_extra"]["example"]
    return example


def describe(app: FastAPI) -> dict[str, Any]:
    """The document itself, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key, `ld_…`"}
        }
        app.openapi_schema = document
    return app.openapi_schema
