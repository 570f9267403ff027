"""Hashing while bytes move."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import FileTooLarge
from registry.storage.digests import copy_hashing, digest_chunks, digest_file

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"


def test_a_file_has_its_published_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file") == (ABC, 3)


@given(st.lists(st.binary(max_size=50)))
def test_a_digest_does_not_depend_on_the_chunks(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert digest_chunks(chunks) == (hashlib.sha256(whole).hexdigest(), len(whole))


def test_a_copy_is_written_and_hashed_in_one_pass(tmp_path: Path) -> None:
    assert copy_hashing(iter([b"a", b"", b"bc"]), tmp_path / "copy", limit=3) == (ABC, 3)
    assert (tmp_path / "copy").read_bytes() == b"abc"


def test_a_copy_stops_at_the_chunk_that_passes_the_limit(tmp_path: Path) -> None:
    taken = []

    def too_much() -> Iterator[bytes]:
        for _ in range(10):
            taken.append(1)
            yield b"xx"

    with pytest.raises(FileTooLarge) as caught:
        copy_hashing(too_much(), tmp_path / "copy", limit=5)
    assert caught.value.details == {"limit_bytes": 5}
    assert len(taken) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_broken_source_leaves_no_copy(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        copy_hashing(broken(), tmp_path / "copy", limit=100)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"as before")
    with pytest.raises(FileExistsError):
        copy_hashing([b"abc"], tmp_path / "copy", limit=3)
    assert (tmp_path / "copy").read_bytes() == b"as before"
