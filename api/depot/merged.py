"""`…/versions/{v}/merged`: the merged checkpoint without a merge job, computed while it is read and never stored."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator

from fastapi import Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.context import Depot, DepotDep, PrincipalDep, SessionDep
from api.depot.merge_options import MergeOptionsDep
from api.depot.merge_schemas import RECIPE, MergedFile, MergedObject
from api.depot.objects_out import digest
from api.downloads import answer_for
from api.refusals import InvalidRange, InvalidValue, RangeNotSatisfiable
from api.routing import Permission, Router
from registry import errors
from registry.adapters import resolve_version
from registry.db import transaction
from registry.jobs.inputs import VersionInput, version_input
from registry.jobs.spec import MergeOptions
from registry.keys import Principal
from registry.merged import Part, VirtualMerges, etag
from registry.merges import find_stored
from registry.storage.links import CONTENT_TYPE

router = Router("Merges")
_MERGED = "/adapters/{name}/versions/{version}/merged"
_RAISES = (
    InvalidValue,
    errors.AdapterNotFound,
    errors.VersionNotFound,
    errors.NotMergeable,
    errors.MergePreparing,
    errors.ArtifactCorrupt,
    errors.StorageUnavailable,
)
_BYTES = {"content": {"application/octet-stream": {"example": "…"}}}
# Parts that one reader has under way: the next is computed while the last is sent.
_PARTS_AHEAD = 2


@router.declare(
    "GET",
    _MERGED,
    permission=Permission.MERGES_READ,
    summary="List the files of a merged version",
    returns=MergedObject,
    raises=_RAISES,
)
def merged_files(
    *, name: str, version: str, depot: DepotDep, principal: PrincipalDep, options: MergeOptionsDep
) -> MergedObject:
    """Names, sizes and validators of the files of the merged checkpoint, whether or not it was ever stored."""
    found, digests = _find(depot, principal, name, version, options)
    files = depot.merged.open(found, options).files
    return MergedObject(
        adapter=name,
        version=int(found.ref.rpartition("@")[2]),
        **options.model_dump(),
        base_digest=digest(found.base.digest),
        files=[
            MergedFile(path=path, bytes=file.size, etag=etag(found, options, path), sha256=digests.get(path))
            for path, file in sorted(files.items())
        ],
    )


@router.declare(
    "GET",
    _MERGED + "/{file:path}",
    permission=Permission.MERGES_READ,
    summary="Download a file of a merged version",
    raises=(*_RAISES, errors.ArtifactNotFound, errors.MergesBusy, InvalidRange, RangeNotSatisfiable),
    response_class=Response,
    responses={
        200: {"description": "The bytes", **_BYTES},
        206: {"description": "One `Range` of them", **_BYTES},
        304: {"description": "`If-None-Match` names the bytes"},
    },
)
@router.declare(
    "HEAD",
    _MERGED + "/{file:path}",
    permission=Permission.MERGES_READ,
    summary="Download a file of a merged version",
    response_class=Response,
    include_in_schema=False,
)
def merged_file(
    *,
    name: str,
    version: str,
    file: str,
    request: Request,
    depot: DepotDep,
    principal: PrincipalDep,
    options: MergeOptionsDep,
) -> Response:
    """The bytes a stored merge would have, or one `Range` of them, computed as they are sent."""
    found, _ = _find(depot, principal, name, version, options)
    checkpoint = depot.merged.open(found, options)
    if file not in checkpoint.files:
        raise errors.ArtifactNotFound
    size = checkpoint.files[file].size
    answer = answer_for(request.headers, etag=etag(found, options, file), size=size, filename=file)
    if isinstance(answer, Response):
        return answer
    if request.method == "HEAD":
        return answer.without_body()
    depot.merged.enter()
    parts = checkpoint.parts(file, answer.start, answer.end)
    return ComputedResponse(depot.merged, parts, status=answer.status, headers=answer.headers)


def _find(
    depot: Depot, principal: Principal, name: str, version: str, options: MergeOptions
) -> tuple[VersionInput, dict[str, str]]:
    """The version, and the digests of the files of its stored merge. No session is held while bytes are read."""
    with transaction(depot.sessions) as session:
        found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
        stored = find_stored(session, version=found, options=options)
        digests = {file.path: file.blob.sha256 for file in stored.files} if stored else {}
        return version_input(session, found), digests


class ComputedResponse(StreamingResponse):
    """Parts in order, computed a little ahead. Gives its place back however it ends, even if it never began."""

    def __init__(self, merges: VirtualMerges, parts: Iterator[Part], *, status: int, headers: dict[str, str]) -> None:
        super().__init__(_computed(merges, parts), status_code=status, headers=headers, media_type=CONTENT_TYPE)
        self._merges = merges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._merges.leave()


async def _computed(merges: VirtualMerges, parts: Iterator[Part]) -> AsyncIterator[memoryview]:
    waiting: deque[asyncio.Future[memoryview]] = deque()
    try:
        for part in parts:
            waiting.append(asyncio.wrap_future(merges.submit(part)))
            if len(waiting) > _PARTS_AHEAD:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for future in waiting:
            future.cancel()


@router.declare(
    "GET",
    "/adapters/{name}/versions/{version}/merge-recipe",
    permission=Permission.MERGES_READ,
    summary="Read how a version is merged",
    raises=(errors.AdapterNotFound, errors.VersionNotFound, errors.ArtifactNotFound),
    response_class=Response,
    responses={200: {"description": "The recipe", "content": {"application/json": {"example": RECIPE}}}},
)
def merge_recipe(name: str, version: str, session: SessionDep, principal: PrincipalDep) -> Response:
    """Which tensors of base and adapter each tensor of the merge is made of, for merging elsewhere. A version that was
    published without one is matched by names."""
    found = resolve_version(session, tenant_id=principal.tenant_id, name=name, ref=version)
    if found.merge_recipe is None:
        raise errors.ArtifactNotFound
    return Response(found.merge_recipe, media_type="application/json", headers={"cache-control": "private, no-store"})
