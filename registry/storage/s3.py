"""Objects in an S3 bucket: AWS, Ceph, SeaweedFS, R2 and the rest.

Nothing here relies on conditional writes, user metadata, ETags or checksum headers, which stores ignore in
different ways. What all of them check is Content-MD5, so every body carries one; the object's own SHA-256 is
computed from the very bytes that are sent, and a multipart upload is completed only after it is right."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from registry.errors import ObjectMissing, StorageUnavailable
from registry.storage import links
from registry.storage.base import ObjectStat, check_range, exactly
from registry.storage.digests import check_bytes, digest_chunks, receive
from registry.storage.keys import check_key, check_prefix, is_key
from registry.storage.multipart import MultipartUpload, content_md5

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

PART_BYTES = 64 * 2**20
_CONFIG = Config(
    signature_version="s3v4",
    s3={"addressing_style": "path"},
    # The default trailing checksums are refused or ignored by several stores.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    retries={"mode": "standard"},
    connect_timeout=5,
    read_timeout=60,
    max_pool_connections=32,
)


class S3Store:
    """An ObjectStore in `bucket` under `prefix`.

    Links are signed for `public_endpoint_url`, the address clients reach. Without keys, boto3 looks for
    credentials in its usual places; they need ListBucket, or S3 answers 403 for what is not there.
    Nobody arbitrates between two writers racing for one key with different bytes: `blob_key` keeps
    writers apart. `part_bytes` (S3 wants ≥ 5 MiB) and `page_size` suit real stores."""

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        endpoint_url: str | None = None,
        public_endpoint_url: str | None = None,
        region: str = "us-east-1",
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        part_bytes: int = PART_BYTES,
        page_size: int = 1000,
    ) -> None:
        def client(endpoint: str | None) -> "S3Client":
            session = boto3.session.Session(access_key_id, secret_access_key, region_name=region)
            made: S3Client = session.client("s3", endpoint_url=endpoint, config=_CONFIG)
            return made

        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._client = client(endpoint_url)
        self._signer = client(public_endpoint_url) if public_endpoint_url else self._client
        self._part_bytes = part_bytes
        self._page_size = page_size

    def put(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        name = self._name(key)
        with path.open("rb") as file, _outages(key):
            if self._size(name) is not None:
                check_bytes(digest_chunks(self.open(key)), sha256=sha256, size=size)
                return
            if path.stat().st_size <= self._part_bytes:
                body = file.read()
                check_bytes(digest_chunks([body]), sha256=sha256, size=size)
                self._client.put_object(Bucket=self._bucket, Key=name, Body=body, ContentMD5=content_md5(body))
            else:
                upload = MultipartUpload(self._client, self._bucket, name, part_bytes=self._part_bytes)
                upload.send(file, sha256=sha256, size=size)
            stored = self._size(name)
        if stored != size:
            raise StorageUnavailable(f"The object store kept {stored} bytes of {size}.", key=key)

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        check_range(start, end)
        name = self._name(key)
        if start == end:  # HTTP has no empty range
            self.stat(key)
            return _nothing()
        span = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        with _outages(key):
            try:
                response = self._client.get_object(Bucket=self._bucket, Key=name, Range=span)
            except ClientError as error:
                if _code(error) == "InvalidRange":  # it starts at or past the end
                    return _nothing()
                raise
        # Some stores answer 200 instead of 206 with the right bytes; a store that sends others must not pass.
        if not response.get("ContentRange", "").startswith(f"bytes {start}-"):
            response["Body"].close()
            raise StorageUnavailable("The object store does not serve ranges.", key=key)
        return _read(key, response["Body"], response["ContentLength"])

    def stat(self, key: str) -> ObjectStat:
        name = self._name(key)
        with _outages(key):
            size = self._size(name)
        if size is None:
            self.ping()  # a missing bucket must not look like a missing object
            raise ObjectMissing(key=key)
        return ObjectStat(key, size)

    def fetch(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        receive(self.open(key), path, sha256=sha256, size=size)

    def delete(self, key: str) -> None:
        name = self._name(key)
        with suppress(ObjectMissing), _outages(key):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        name = self._prefix + check_prefix(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=name, PaginationConfig={"PageSize": self._page_size}
        )
        with _outages(prefix):
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._prefix)
                    if is_key(key):  # a bucket may hold what others put there
                        yield ObjectStat(key, item["Size"])

    def link(self, key: str, *, filename: str, seconds: int) -> str:
        with _outages(key):
            return self._signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self._bucket,
                    "Key": self._name(key),
                    "ResponseContentDisposition": links.attachment(filename),
                    "ResponseContentType": links.CONTENT_TYPE,
                },
                ExpiresIn=seconds,
            )

    def ping(self) -> None:
        with _outages(self._bucket):
            self._client.head_bucket(Bucket=self._bucket)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _size(self, name: str) -> int | None:
        try:
            return self._client.head_object(Bucket=self._bucket, Key=name)["ContentLength"]
        except ClientError as error:
            if _code(error) in {"404", "NoSuchKey"}:
                return None
            raise


def _read(key: str, body: "StreamingBody", length: int) -> Generator[bytes, None, None]:
    with closing(body), _outages(key):
        yield from exactly(body.read, length)


def _nothing() -> Generator[bytes, None, None]:
    yield from ()


def _code(error: ClientError) -> str:
    return error.response["Error"]["Code"]


@contextmanager
def _outages(what: str) -> Iterator[None]:
    """Turn what boto3 raises into what callers of a store know."""
    try:
        yield
    except ClientError as error:
        if _code(error) == "NoSuchKey":
            raise ObjectMissing(key=what) from error
        raise StorageUnavailable(
            f"The object store refuses {error.operation_name} with {_code(error)}.", key=what
        ) from error
    except (BotoCoreError, HTTPError) as error:
        raise StorageUnavailable(f"The object store fails with {type(error).__name__}.", key=what) from error
