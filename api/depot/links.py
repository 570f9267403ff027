"""A file of an artifact as a redirect to the store: the API hands out a short-lived link and moves no bytes."""

from typing import Any

from fastapi import Response

from api.context import Depot
from registry.models import Blob

REDIRECT: dict[int | str, dict[str, Any]] = {
    302: {
        "description": "Follow `Location`, without the API key; the link is good for some minutes.",
        "headers": {
            "Location": {"schema": {"type": "string"}, "example": "http://127.0.0.1:8321/v1/objects/eyJrZX….5f2a"},
            "x-depot-sha256": {"schema": {"type": "string"}, "description": "What the bytes must hash to"},
            "x-depot-size": {"schema": {"type": "integer"}, "description": "How many there are"},
        },
    }
}


def redirect_to(depot: Depot, blob: Blob, path: str) -> Response:
    """302 to a signed link for one stored file."""
    link = depot.store.link(blob.key, filename=path, seconds=depot.settings.link_seconds)
    headers = {
        "location": link,
        "x-depot-sha256": blob.sha256,
        "x-depot-size": str(blob.size),
        "cache-control": "no-store",
    }
    return Response(status_code=302, headers=headers)
