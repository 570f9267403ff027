"""`/v1/adapters/{name}/versions`: immutable versions, by number, alias or `latest`."""

from typing import Annotated

from fastapi import Query, Response

from api.context import DepotDep, PrincipalDep, SessionDep
from api.depot.links import REDIRECT, redirect_to
from api.depot.objects_out import version_objects
from api.depot.schemas import VersionDeleted, VersionObject
from api.routing import Permission, Router
from api.schemas import Listing, listing
from registry import errors
from registry.adapters import delete_version, get_adapter, get_version_file, list_versions, resolve_version

router = Router("Versions")
_VERSIONS = "/adapters/{name}/versions"
_ABSENT = (errors.AdapterNotFound, errors.VersionNotFound)


@router.declare(
    "GET",
    _VERSIONS,
    permission=Permission.ADAPTERS_READ,
    summary="List versions, newest first",
    returns=Listing[VersionObject],
    raises=(errors.AdapterNotFound, errors.InvalidCursor),
)
def versions(
    name: str,
    session: SessionDep,
    principal: PrincipalDep,
    after: Annotated[str | None, Query(description="The last version number of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Listing[VersionObject]:
    """The versions of one adapter that are not deleted."""
    adapter = get_adapter(session, tenant_id=principal.tenant_id, name=name)
    if after is not None and not (after.isascii() and after.isdecimal() and len(after) <= 9):
        raise errors.InvalidCursor(param="after")
    page = list_versions(session, adapter, after=int(after) if after is not None else None, limit=limit)
    items = version_objects(session, adapter, page.items)
    return listing(VersionObject, items, has_more=page.has_more, cursor=lambda version: str(version.version))


@router.declare(
    "GET",
    _VERSIONS + "/{version}",
    permission=Permission.ADAPTERS_READ,
    summary="Read a version",
    returns=VersionObject,
    raises=_ABSENT,
)
def version(name: str, version: str, session: SessionDep, principal: PrincipalDep) -> VersionObject:
    """One version, by number (`7`, `v7`), alias or `latest`."""
    found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
    return version_objects(session, found.adapter, [found])[0]


@router.declare(
    "DELETE",
    _VERSIONS + "/{version}",
    permission=Permission.ADAPTERS_WRITE,
    summary="Delete a version",
    returns=VersionDeleted,
    raises=(*_ABSENT, errors.VersionInUse),
)
def remove_version(name: str, version: str, session: SessionDep, principal: PrincipalDep) -> VersionDeleted:
    """Deletes a version, its files and its merges. Its number is never used again."""
    found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
    delete_version(session, found)
    return VersionDeleted(ref=f"{found.adapter.name}@{found.version}")


@router.declare(
    "GET",
    _VERSIONS + "/{version}/files/{file:path}",
    permission=Permission.ADAPTERS_READ,
    summary="Download a file of a version",
    raises=(*_ABSENT, errors.ArtifactNotFound),
    status=302,
    response_class=Response,
    responses=REDIRECT,
)
def version_file(
    *, name: str, version: str, file: str, session: SessionDep, depot: DepotDep, principal: PrincipalDep
) -> Response:
    """Redirects to the bytes; `files` of the version lists the names."""
    found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
    stored = get_version_file(session, found, file)
    return redirect_to(depot, stored.blob, stored.path)
