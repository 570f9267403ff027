"""The stores that the conformance tests run on. Each is the real thing, reached the way production reaches it."""

import os
import re
import shutil
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import boto3
import pytest

from registry.errors import LinkExpired, LinkInvalid
from registry.storage import ObjectStore, links
from registry.storage.local import LocalStore
from registry.storage.s3 import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 5 * 2**20  # the least that S3 takes
SECRET = b"0123456789abcdef0123456789abcdef"
LANES = ["local", "rclone"]
if "DEPOT_TEST_RADOSGW" in os.environ:
    LANES.append(pytest.param("radosgw", marks=pytest.mark.radosgw))


class LinkRefused(Exception):
    """The server does not serve this link."""


@dataclass(frozen=True)
class S3Server:
    """An S3 server and the only keys it accepts."""

    endpoint_url: str
    access_key_id: str
    secret_access_key: str

    def client(self) -> "S3Client":
        session = boto3.session.Session(self.access_key_id, self.secret_access_key, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint_url)

    def store(self, bucket: str, **over: object) -> S3Store:
        values = {
            "endpoint_url": self.endpoint_url,
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "prefix": "some/depot",
            "part_bytes": PART_BYTES,
            "page_size": 2,
        }
        return S3Store(bucket, **(values | over))


def make_bucket(client: "S3Client") -> str:
    name = f"depot-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return name


class Lane(Protocol):
    """One store, and what a test does to it behind its back."""

    store: ObjectStore
    unreachable: ObjectStore

    def overwrite(self, key: str, data: bytes) -> None: ...

    def leftovers(self) -> list[str]:
        """What failed uploads left behind."""
        ...

    def visit(self, url: str) -> tuple[str, bytes]:
        """GET a link without credentials: (Content-Disposition, body), or LinkRefused."""
        ...


class LocalLane:
    def __init__(self, directory: Path) -> None:
        self._root = directory / "store"
        gone = directory / "gone"
        self.store = LocalStore(self._root, secret=SECRET, public_url="http://depot.test/")
        self.unreachable = LocalStore(gone, secret=SECRET, public_url="http://depot.test")
        shutil.rmtree(gone)

    def overwrite(self, key: str, data: bytes) -> None:
        (self._root / key).write_bytes(data)

    def leftovers(self) -> list[str]:
        return [path.name for path in (self._root / ".incoming").iterdir()]

    def visit(self, url: str) -> tuple[str, bytes]:
        assert url.startswith("http://depot.test/v1/objects/")
        try:
            key, filename = self.store.open_link(url.rpartition("/")[2], now=time.time())
        except (LinkInvalid, LinkExpired) as error:
            raise LinkRefused from error
        return links.attachment(filename), b"".join(self.store.open(key))


class S3Lane:
    def __init__(self, server: S3Server) -> None:
        self._raw = server.client()
        self.bucket = make_bucket(self._raw)
        self.store = server.store(self.bucket)
        # Port 1 is closed: nothing that this user started can listen there.
        self.unreachable = server.store(self.bucket, endpoint_url="http://127.0.0.1:1")

    def overwrite(self, key: str, data: bytes) -> None:
        self._raw.put_object(Bucket=self.bucket, Key=f"some/depot/{key}", Body=data)

    def leftovers(self) -> list[str]:
        try:
            found = self._raw.list_multipart_uploads(Bucket=self.bucket)
        except self._raw.exceptions.NoSuchUpload:  # how rclone says that there are none
            return []
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def visit(self, url: str) -> tuple[str, bytes]:
        try:
            with urllib.request.urlopen(url) as response:
                return response.headers["Content-Disposition"], response.read()
        except urllib.error.HTTPError as error:
            raise LinkRefused(error.code) from error

    def clear(self) -> None:
        for item in self._raw.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            self._raw.delete_object(Bucket=self.bucket, Key=item["Key"])


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("rclone")
    log = directory / "log"
    command = [Path(sysconfig.get_path("scripts"), "rclone"), "serve", "s3", "--config", os.devnull]
    command += ["--auth-key", "depot-access,depot-secret", "--addr", "127.0.0.1:0", directory / "buckets"]
    (directory / "buckets").mkdir()
    with log.open("wb") as output, subprocess.Popen(command, stderr=output) as process:
        try:
            while not (started := re.search(r"server on \[(http://[\d.:]+)/?\]", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield S3Server(started[1], "depot-access", "depot-secret")
        finally:
            process.kill()


@pytest.fixture(scope="session")
def radosgw() -> S3Server:
    url = urlsplit(os.environ["DEPOT_TEST_RADOSGW"])
    return S3Server(f"{url.scheme}://{url.hostname}:{url.port}", url.username or "", url.password or "")


@pytest.fixture(scope="session", params=LANES[1:])
def s3_server(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    return make_bucket(s3_server.client())


@pytest.fixture(scope="session")
def rclone_lane(rclone: S3Server) -> S3Lane:
    return S3Lane(rclone)


@pytest.fixture(scope="session")
def radosgw_lane(radosgw: S3Server) -> S3Lane:
    return S3Lane(radosgw)


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lane]:
    if request.param == "local":
        yield LocalLane(tmp_path)
    else:  # its clients take longer to make than most tests take
        s3_lane: S3Lane = request.getfixturevalue(f"{request.param}_lane")
        yield s3_lane
        s3_lane.clear()
