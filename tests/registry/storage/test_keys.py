"""Object keys."""

import uuid
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.storage.keys import blob_key, check_key, check_prefix, is_key

BLOB = uuid.UUID("00000000-0000-4000-8000-0000000000ff")


def test_a_blob_key_names_the_bytes_and_the_writer() -> None:
    assert blob_key("ab" * 32, BLOB) == f"blobs/ab/{'ab' * 32}/000000000000400080000000000000ff"
    assert blob_key("ab" * 32, uuid.uuid4()) != blob_key("ab" * 32, uuid.uuid4())
    assert is_key(blob_key("ab" * 32, BLOB))


@pytest.mark.parametrize("sha256", ["", "AB" * 32, "ab" * 31, "ab" * 33, "sha256:" + "ab" * 32, "../" + "a" * 61])
def test_a_blob_key_needs_a_digest(sha256: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        blob_key(sha256, BLOB)


@given(st.text(st.sampled_from("ab0./_-~A\\\0\n é")))
def test_no_key_leaves_its_folder(text: str) -> None:
    if is_key(text):
        parts = PurePosixPath(text).parts
        assert "/".join(parts) == text
        assert not any(part.startswith((".", "/")) or ".." in part for part in parts)
        assert check_key(text) == text


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}(/[a-z0-9][a-z0-9_-]{0,8}){0,3}", fullmatch=True))
def test_every_start_of_a_key_is_a_prefix(key: str) -> None:
    assert is_key(key)
    for end in range(len(key) + 1):
        assert check_prefix(key[:end]) == key[:end]
