"""`/v1/objects/{token}`: what a signed link of the local store points at. The signature is the permission."""

import time

from fastapi import Request, Response

from api.context import StoreDep
from api.downloads import send_object
from api.refusals import InvalidRange, RangeNotSatisfiable
from api.routing import Permission, Router
from registry import errors
from registry.storage.keys import key_sha256
from registry.storage.local import LocalStore

router = Router("Downloads")
_BYTES = {"content": {"application/octet-stream": {"example": "…"}}}


@router.declare(
    "GET",
    "/objects/{token}",
    permission=Permission.PUBLIC,
    summary="Follow a download link",
    raises=(
        errors.LinkInvalid,
        errors.LinkExpired,
        errors.ArtifactNotFound,
        InvalidRange,
        RangeNotSatisfiable,
        errors.ArtifactCorrupt,
        errors.StorageUnavailable,
    ),
    response_class=Response,
    responses={200: {"description": "The bytes", **_BYTES}, 206: {"description": "One `Range` of them", **_BYTES}},
)
@router.declare(
    "HEAD",
    "/objects/{token}",
    permission=Permission.PUBLIC,
    summary="Follow a download link",
    response_class=Response,
    include_in_schema=False,
)
def object_bytes(token: str, request: Request, store: StoreDep) -> Response:
    """The bytes, or one `Range` of them, for whoever holds the link, until it expires."""
    if not isinstance(store, LocalStore):
        raise errors.ArtifactNotFound  # links of other stores never come here
    key, filename = store.open_link(token, now=time.time())
    try:
        return send_object(
            store,
            key=key,
            sha256=key_sha256(key),
            size=store.stat(key).size,
            filename=filename,
            headers=request.headers,
            head=request.method == "HEAD",
        )
    except errors.ObjectMissing:
        raise errors.ArtifactNotFound from None
