"""From the settings' values to a store."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from registry.storage.base import ObjectStore
from registry.storage.local import LocalStore
from registry.storage.s3 import S3Store


def make_store(
    store_url: str,
    *,
    secret_key: str,
    public_url: str,
    s3_endpoint_url: str | None = None,
    s3_public_endpoint_url: str | None = None,
    s3_region: str = "us-east-1",
    s3_access_key_id: str | None = None,
    s3_secret_access_key: str | None = None,
) -> ObjectStore:
    """The store that `file:///a/directory` or `s3://bucket[/prefix]` names; ValueError for any other URL."""
    url = urlsplit(store_url)
    plain = not (url.query or url.fragment)
    path = unquote(url.path)
    if url.scheme == "file" and plain and not url.netloc and path.strip("/"):
        return LocalStore(Path(path), secret=secret_key.encode(), public_url=public_url)
    if url.scheme == "s3" and plain and url.netloc:
        return S3Store(
            url.netloc,
            prefix=path.strip("/"),
            endpoint_url=s3_endpoint_url,
            public_endpoint_url=s3_public_endpoint_url,
            region=s3_region,
            access_key_id=s3_access_key_id,
            secret_access_key=s3_secret_access_key,
        )
    raise ValueError(f"DEPOT_STORE_URL must be file:///a/directory or s3://bucket[/prefix], not {store_url!r}")
