"""`/v1/base-models`: frozen bases, made of uploaded files. The service reads no path and no URL of a client's."""

import uuid
from typing import Annotated

from fastapi import Query

from api.context import PrincipalDep, SessionDep, StoreDep
from api.depot.objects_out import base_model_object
from api.depot.schemas import BASE_MODEL_CREATE, BaseModelIn, BaseModelObject
from api.refusals import InvalidType, MissingField, UnknownField
from api.routing import Permission, Router
from api.schemas import Listing, listing
from registry import errors
from registry.base_models import create_base_model, get_base_model, list_base_models
from registry.ids import parse_id

router = Router("Base models")


@router.declare(
    "POST",
    "/base-models",
    permission=Permission.BASE_MODELS_WRITE,
    summary="Register a base model",
    returns=BaseModelObject,
    status=201,
    raises=(
        UnknownField,
        MissingField,
        InvalidType,
        errors.InvalidBaseModelName,
        errors.InvalidBaseModel,
        errors.InvalidSource,
        errors.UnknownBaseFile,
        errors.NameTaken,
        errors.StorageUnavailable,
    ),
    extra={"requestBody": {"content": {"application/json": {"example": BASE_MODEL_CREATE}}}},
)
def register(body: BaseModelIn, session: SessionDep, store: StoreDep, principal: PrincipalDep) -> BaseModelObject:
    """Checks uploaded files and registers them under a name; once more with the same bytes changes nothing."""
    base = create_base_model(
        session,
        store=store,
        tenant_id=principal.tenant_id,
        name=body.name,
        source=body.source,
        revision=body.revision,
        files={path: _file_id(path, text) for path, text in body.files.items()},
    )
    return base_model_object(base)


@router.declare(
    "GET",
    "/base-models",
    permission=Permission.BASE_MODELS_READ,
    summary="List base models",
    returns=Listing[BaseModelObject],
    raises=(errors.InvalidCursor,),
)
def base_models(
    session: SessionDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Listing[BaseModelObject]:
    """The catalogue, by name. `after` is the last name of the page before."""
    page = list_base_models(session, after=after, limit=limit)
    items = [base_model_object(base) for base in page.items]
    return listing(BaseModelObject, items, has_more=page.has_more, cursor=lambda base: base.name)


@router.declare(
    "GET",
    "/base-models/{name:path}",
    permission=Permission.BASE_MODELS_READ,
    summary="Read a base model",
    returns=BaseModelObject,
    raises=(errors.BaseModelNotFound,),
)
def base_model(name: str, session: SessionDep) -> BaseModelObject:
    """One base model with the names that `target_modules` may use."""
    return base_model_object(get_base_model(session, name))


def _file_id(path: str, text: str) -> uuid.UUID:
    if (found := parse_id("file", text)) is None:
        raise errors.UnknownBaseFile(param=f"files.{path[:80]}")
    return found
