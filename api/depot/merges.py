"""Merged checkpoints: asked for per version and options, made by a job, downloaded like any artifact."""

import uuid

from fastapi import Response

from api.context import DepotDep, PrincipalDep, SessionDep
from api.depot.links import REDIRECT, redirect_to
from api.depot.merge_schemas import MERGE, MergeIn, MergeObject
from api.depot.objects_out import merge_object
from api.refusals import InvalidValue, UnknownField
from api.routing import Permission, Router
from registry import errors
from registry.adapters import resolve_version
from registry.ids import parse_id
from registry.jobs.placement import Placement
from registry.jobs.spec import MergeOptions
from registry.merges import get_merge, get_merge_file, request_merge

router = Router("Merges")


@router.declare(
    "POST",
    "/adapters/{name}/versions/{version}/merges",
    permission=Permission.MERGES_WRITE,
    summary="Merge a version into its base model",
    returns=MergeObject,
    status=202,
    raises=(
        UnknownField,
        InvalidValue,
        errors.AdapterNotFound,
        errors.VersionNotFound,
        errors.AliasReserved,
        errors.InvalidAliasName,
        errors.QuotaExceeded,
    ),
    extra={
        "x-field-permissions": {"alias": Permission.ADAPTERS_WRITE.value},  # as for whoever moves an alias elsewhere
        "requestBody": {"content": {"application/json": {"example": {"dtype": "base"}}}},
    },
    responses={
        200: {
            "model": MergeObject,
            "description": "The same merge was asked for before; this is it",
            "content": {"application/json": {"example": MERGE}},
        }
    },
)
def merge_version(
    *,
    name: str,
    version: str,
    response: Response,
    session: SessionDep,
    depot: DepotDep,
    principal: PrincipalDep,
    body: MergeIn | None = None,
) -> MergeObject:
    """Queues a job that folds the adapter into its base: a full model in the usual files. The body may be empty."""
    found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
    placement = Placement(deadline_seconds=depot.settings.deadline_seconds)
    asked = body or MergeIn()
    options = MergeOptions.model_validate(asked.model_dump(exclude={"alias"}))
    merge, created = request_merge(session, version=found, options=options, alias=asked.alias, placement=placement)
    response.status_code = 202 if created else 200
    return merge_object(merge)


@router.declare(
    "GET",
    "/merges/{merge_id}",
    permission=Permission.MERGES_READ,
    summary="Read a merge",
    returns=MergeObject,
    raises=(errors.MergeNotFound,),
)
def merge(merge_id: str, session: SessionDep, principal: PrincipalDep) -> MergeObject:
    """How far a merge is, and its files once it has succeeded."""
    return merge_object(get_merge(session, tenant_id=principal.tenant_id, merge_id=_merge_id(merge_id)))


@router.declare(
    "GET",
    "/merges/{merge_id}/files/{file:path}",
    permission=Permission.MERGES_READ,
    summary="Download a file of a merge",
    raises=(errors.MergeNotFound, errors.ArtifactNotFound, errors.MergeNotReady),
    status=302,
    response_class=Response,
    responses=REDIRECT,
)
def merge_file(merge_id: str, file: str, session: SessionDep, depot: DepotDep, principal: PrincipalDep) -> Response:
    """Redirects to the bytes; `files` of the merge lists the names."""
    found = get_merge(session, tenant_id=principal.tenant_id, merge_id=_merge_id(merge_id))
    stored = get_merge_file(session, found, file)
    return redirect_to(depot, stored.blob, stored.path)


def _merge_id(text: str) -> uuid.UUID:
    if (found := parse_id("merge", text)) is None:
        raise errors.MergeNotFound
    return found
