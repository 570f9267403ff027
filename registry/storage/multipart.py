"""Large bodies: an S3 upload in parts whose whole is checked before it becomes an object."""

import hashlib
from base64 import b64encode
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from registry.apart import run_apart
from registry.failpoints import hit
from registry.storage.digests import check_bytes, file_chunks

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

_PARALLEL_PARTS = 4


class MultipartUpload:
    """The upload of one object, a few parts at a time; it holds at most five parts in memory."""

    def __init__(self, client: "S3Client", bucket: str, name: str, *, part_bytes: int) -> None:
        self._client = client
        self._bucket = bucket
        self._name = name
        self._part_bytes = part_bytes
        self._id = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]

    def send(self, file: BinaryIO, *, sha256: str, size: int) -> None:
        """Send the rest of `file`; complete the upload if that was (sha256, size), and else abort it.

        Where even the abort fails, the bucket's AbortIncompleteMultipartUpload rule has to collect it."""
        try:
            parts, found = self._send_parts(file)
            check_bytes(found, sha256=sha256, size=size)
            hit("s3.before_complete")
            # boto3 repeats a completion whose answer got lost, and then the upload is no more.
            # The caller asks for the object's size afterwards, which tells the two cases apart.
            with suppress(self._client.exceptions.NoSuchUpload):
                self._client.complete_multipart_upload(
                    Bucket=self._bucket, Key=self._name, UploadId=self._id, MultipartUpload={"Parts": parts}
                )
        except BaseException:
            with suppress(ClientError, BotoCoreError):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._name, UploadId=self._id)
            raise

    def _send_parts(self, file: BinaryIO) -> tuple[list["CompletedPartTypeDef"], tuple[str, int]]:
        """Send every part; what completes the upload, and the (sha256, size) of what was sent."""
        parts: list[CompletedPartTypeDef] = []
        sending: deque[Future[CompletedPartTypeDef]] = deque()
        digest, size = hashlib.sha256(), 0
        try:
            for number, body in enumerate(file_chunks(file, self._part_bytes), start=1):
                digest.update(body)
                size += len(body)
                if len(sending) == _PARALLEL_PARTS:
                    parts.append(sending.popleft().result())
                sending.append(run_apart(partial(self._send_part, number, body), f"part-{number}"))
            parts += [part.result() for part in sending]
        finally:
            wait(sending)  # nothing may arrive after an abort
        return parts, (digest.hexdigest(), size)

    def _send_part(self, number: int, body: bytes) -> "CompletedPartTypeDef":
        answer = self._client.upload_part(
            Bucket=self._bucket,
            Key=self._name,
            UploadId=self._id,
            PartNumber=number,
            Body=body,
            ContentMD5=content_md5(body),
        )
        hit("s3.part_sent")
        return {"PartNumber": number, "ETag": answer["ETag"]}


def content_md5(body: bytes) -> str:
    """The `Content-MD5` of a body: against damage on the way, not against an attacker."""
    return b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
