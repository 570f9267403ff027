"""From settings to a store."""

from pathlib import Path

import pytest

from registry.storage.local import LocalStore
from registry.storage.open import make_store
from tests.registry.storage.conftest import SECRET, S3Server
from tests.registry.storage.sample import make_sample

SHARED = {"secret_key": SECRET.decode(), "public_url": "http://depot.test"}


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    sample = make_sample(tmp_path)
    store = make_store(f"{tmp_path.as_uri()}/a%20store", **SHARED)
    store.put(sample.key, sample.path, **sample.facts)
    assert (tmp_path / "a store" / sample.key).read_bytes() == sample.data
    assert isinstance(store, LocalStore)
    token = store.link(sample.key, filename="f", seconds=60).removeprefix("http://depot.test/v1/objects/")
    assert store.open_link(token, now=0) == (sample.key, "f")


@pytest.mark.parametrize("prefix", ["", "/", "/some/prefix", "/some/prefix/"])
def test_an_s3_url_is_a_bucket_and_a_prefix(s3_server: S3Server, bucket: str, prefix: str, tmp_path: Path) -> None:
    sample = make_sample(tmp_path)
    store = make_store(
        f"s3://{bucket}{prefix}",
        s3_endpoint_url=s3_server.endpoint_url,
        s3_access_key_id=s3_server.access_key_id,
        s3_secret_access_key=s3_server.secret_access_key,
        **SHARED,
    )
    store.put(sample.key, sample.path, **sample.facts)
    found = s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]
    assert [item["Key"] for item in found] == [f"{prefix.strip('/')}/{sample.key}".lstrip("/")]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/a/directory",
        "file://",
        "file:///",
        "file://relative/path",
        "s3://",
        "s3:///a",
        "gs://bucket",
        "file:///a?b",
        "s3://b#c",
    ],
)
def test_other_urls_are_refused_with_the_two_that_work(url: str) -> None:
    with pytest.raises(ValueError, match=r"file:///a/directory or s3://bucket"):
        make_store(url, **SHARED)
