"""`/v1/adapters`: what was trained, and the names that point at its versions."""

from typing import Annotated

from fastapi import Query

from api.context import PrincipalDep, SessionDep
from api.depot.objects_out import adapter_objects
from api.depot.schemas import AdapterObject, AliasDeleted, AliasIn, AliasObject
from api.refusals import InvalidType, MissingField, UnknownField
from api.routing import Permission, Router
from api.schemas import Listing, listing
from registry import errors
from registry.adapters import delete_alias, get_adapter, list_adapters, set_alias

router = Router("Adapters")


@router.declare(
    "GET",
    "/adapters",
    permission=Permission.ADAPTERS_READ,
    summary="List adapters",
    returns=Listing[AdapterObject],
    raises=(errors.InvalidCursor,),
)
def adapters(
    session: SessionDep,
    principal: PrincipalDep,
    search: Annotated[str | None, Query(max_length=128, description="Part of the name, in any case")] = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Listing[AdapterObject]:
    """Your adapters by name. `after` is the last name of the page before."""
    page = list_adapters(session, tenant_id=principal.tenant_id, search=search, after=after, limit=limit)
    items = adapter_objects(session, page.items)
    return listing(AdapterObject, items, has_more=page.has_more, cursor=lambda adapter: adapter.name)


@router.declare(
    "GET",
    "/adapters/{name}",
    permission=Permission.ADAPTERS_READ,
    summary="Read an adapter",
    returns=AdapterObject,
    raises=(errors.AdapterNotFound,),
)
def adapter(name: str, session: SessionDep, principal: PrincipalDep) -> AdapterObject:
    """One adapter with its latest version and its aliases."""
    found = get_adapter(session, tenant_id=principal.tenant_id, name=name)
    return adapter_objects(session, [found])[0]


@router.declare(
    "PUT",
    "/adapters/{name}/aliases/{alias}",
    permission=Permission.ADAPTERS_WRITE,
    summary="Point an alias at a version",
    returns=AliasObject,
    raises=(
        UnknownField,
        MissingField,
        InvalidType,
        errors.AliasReserved,
        errors.InvalidAliasName,
        errors.AdapterNotFound,
        errors.VersionNotFound,
    ),
    extra={"requestBody": {"content": {"application/json": {"example": {"version": 7}}}}},
)
def put_alias(name: str, alias: str, body: AliasIn, session: SessionDep, principal: PrincipalDep) -> AliasObject:
    """Makes or moves an alias in one step: readers see the old version or the new one, never neither."""
    found = get_adapter(session, tenant_id=principal.tenant_id, name=name)
    pointer = set_alias(session, found, name=alias, version=body.version)
    return AliasObject(adapter=found.name, alias=pointer.name, version=pointer.version.version)


@router.declare(
    "DELETE",
    "/adapters/{name}/aliases/{alias}",
    permission=Permission.ADAPTERS_WRITE,
    summary="Remove an alias",
    returns=AliasDeleted,
    raises=(errors.AdapterNotFound, errors.AliasNotFound),
)
def remove_alias(name: str, alias: str, session: SessionDep, principal: PrincipalDep) -> AliasDeleted:
    """Forgets a name; the version it pointed at stays."""
    found = get_adapter(session, tenant_id=principal.tenant_id, name=name)
    delete_alias(session, found, name=alias)
    return AliasDeleted(adapter=found.name, alias=alias)
