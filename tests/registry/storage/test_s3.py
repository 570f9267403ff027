"""What only an S3 store can get wrong, on a real server and on one that misbehaves."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from registry.errors import StorageUnavailable
from registry.storage import multipart, s3
from tests.registry.storage.conftest import PART_BYTES, LinkRefused, S3Lane, S3Server
from tests.registry.storage.sample import Sample, make_sample
from tests.registry.storage.test_conformance import operations

SEVERAL_PARTS = 2 * PART_BYTES + 12_345


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return make_sample(tmp_path)


@pytest.fixture(scope="module")
def s3_lane(s3_server: S3Server) -> S3Lane:
    return S3Lane(s3_server)


@pytest.mark.parametrize(("size", "parts"), [(PART_BYTES, 0), (PART_BYTES + 1, 2), (SEVERAL_PARTS, 3)])
def test_files_above_one_part_go_up_in_parts(
    s3_server: S3Server, s3_lane: S3Lane, tmp_path: Path, size: int, parts: int
) -> None:
    sample = make_sample(tmp_path, size)
    store = s3_server.store(s3_lane.bucket)
    calls = []
    for call in ("PutObject", "UploadPart"):
        store._client.meta.events.register(f"before-call.s3.{call}", lambda model, **_: calls.append(model.name))
    store.put(sample.key, sample.path, **sample.facts)
    assert calls == (["UploadPart"] * parts or ["PutObject"])


def test_two_prefixes_of_a_bucket_do_not_see_each_other(s3_server: S3Server, s3_lane: S3Lane, sample: Sample) -> None:
    other = s3_server.store(s3_lane.bucket, prefix="some/other")
    other.put(sample.key, sample.path, **sample.facts)
    assert sample.key not in [found.key for found in s3_lane.store.list("")]
    assert [found.key for found in other.list("")] == [sample.key]


def test_links_are_signed_for_the_public_endpoint(s3_server: S3Server, s3_lane: S3Lane, sample: Sample) -> None:
    public = s3_server.endpoint_url.replace("127.0.0.1", "localhost")
    store = s3_server.store(s3_lane.bucket, public_endpoint_url=public)
    store.put(sample.key, sample.path, **sample.facts)
    link = store.link(sample.key, filename="f", seconds=60)
    assert urlsplit(link).hostname == "localhost"
    assert s3_lane.visit(link)[1] == sample.data


@pytest.mark.parametrize(
    ("signed", "changed"),
    [("octet-stream", "html"), ("attachment", "inline"), ("Expires=60", "Expires=6000"), ("blobs%2F", "other%2F")],
)
def test_nothing_in_a_link_can_be_changed(s3_lane: S3Lane, sample: Sample, signed: str, changed: str) -> None:
    s3_lane.store.put(sample.key, sample.path, **sample.facts)
    link = s3_lane.store.link(sample.key, filename="f", seconds=60).replace("blobs/", "blobs%2F")
    assert signed in link
    with pytest.raises(LinkRefused):
        s3_lane.visit(link.replace(signed, changed))


def test_a_missing_bucket_is_an_outage_and_not_a_missing_object(s3_server: S3Server, sample: Sample) -> None:
    store = s3_server.store("no-such-bucket")
    calls = operations(store, sample.key, sample)
    del calls["delete"]  # rclone answers 204
    for call in calls.values():
        with pytest.raises(StorageUnavailable):
            call()


def test_refused_keys_are_an_outage(s3_server: S3Server, s3_lane: S3Lane, sample: Sample) -> None:
    store = s3_server.store(s3_lane.bucket, secret_access_key="wrong-secret")
    for call in operations(store, sample.key, sample).values():
        with pytest.raises(StorageUnavailable):
            call()


@pytest.mark.parametrize("size", [1000, SEVERAL_PARTS])
def test_bytes_damaged_on_the_way_are_not_stored(
    s3_lane: S3Lane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    sample = make_sample(tmp_path, size)
    # The server sees a body and the MD5 of another one, as after a flipped bit.
    for module in (s3, multipart):
        monkeypatch.setattr(module, "content_md5", lambda body: multipart_md5(body + b"x"))
    with pytest.raises(StorageUnavailable, match=r"BadDigest|NoSuchUpload"):
        s3_lane.store.put(sample.key, sample.path, **sample.facts)
    assert list(s3_lane.store.list(sample.key)) == []
    assert s3_lane.leftovers() == []


multipart_md5 = multipart.content_md5


def test_a_completion_whose_answer_is_lost_still_counts(s3_server: S3Server, s3_lane: S3Lane, tmp_path: Path) -> None:
    sample = make_sample(tmp_path, SEVERAL_PARTS)
    store = s3_server.store(s3_lane.bucket)
    answers = []

    def repeat_once(response: object, **_: object) -> float | None:
        answers.append(response)
        return 0.0 if len(answers) == 1 else None

    store._client.meta.events.register_first("needs-retry.s3.CompleteMultipartUpload", repeat_once)
    store.put(sample.key, sample.path, **sample.facts)
    assert len(answers) == 2
    assert b"".join(store.open(sample.key)) == sample.data


# ── a server that misbehaves ─────────────────────────────────────────────────────────────────────

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server_that(answer: Answer) -> Iterator[S3Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield S3Server(f"http://127.0.0.1:{server.server_port}", "access", "secret")
        server.shutdown()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: object) -> None:
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def test_a_server_error_is_an_outage(sample: Sample) -> None:
    with server_that(lambda handler: reply(handler, 503)) as server:
        with pytest.raises(StorageUnavailable):
            server.store("bucket").open(sample.key)
        with pytest.raises(StorageUnavailable):
            server.store("bucket").ping()


def test_a_transfer_that_breaks_off_is_an_outage(sample: Sample, tmp_path: Path) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, 206, sample.data[:500], Content_Length=sample.size, Content_Range="bytes 0-999/1000")

    with server_that(half) as server:
        store = server.store("bucket")
        chunks = store.open(sample.key)
        with pytest.raises(StorageUnavailable):
            list(chunks)
        (tmp_path / "target").mkdir()
        with pytest.raises(StorageUnavailable):
            store.fetch(sample.key, tmp_path / "target" / "file", **sample.facts)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_server_that_ignores_ranges_is_not_believed(sample: Sample) -> None:
    with server_that(lambda handler: reply(handler, 200, sample.data)) as server:
        store = server.store("bucket")
        with pytest.raises(StorageUnavailable, match="ranges"):
            store.open(sample.key, start=10)


def test_a_server_that_keeps_fewer_bytes_is_not_believed(sample: Sample) -> None:
    stored = []

    def lose_half(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "PUT":
            stored.append(handler.path)
            return reply(handler, 200, ETag='"0"')
        return reply(handler, 200 if stored else 404, Content_Length=sample.size // 2)

    with server_that(lose_half) as server, pytest.raises(StorageUnavailable, match="500 bytes of 1000"):
        server.store("bucket").put(sample.key, sample.path, **sample.facts)
    assert len(stored) == 1
