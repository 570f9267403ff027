"""SHA-256 while bytes move: nothing is read twice, and nothing unverified gets its final name."""

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from registry.errors import ArtifactCorrupt, FileTooLarge

CHUNK_BYTES = 2**20


def file_chunks(file: BinaryIO, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The rest of `file`, `size` bytes at a time."""
    return iter(lambda: file.read(size), b"")


def digest_file(path: Path) -> tuple[str, int]:
    """(sha256 as lower-case hex, size in bytes) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def digest_chunks(chunks: Iterable[bytes]) -> tuple[str, int]:
    """(sha256, size) of bytes that are not kept."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def copy_hashing(chunks: Iterable[bytes], path: Path, limit: int) -> tuple[str, int]:
    """Write `chunks` to a new file at `path`, synced to disk, and return its (sha256, size).

    Raises FileTooLarge at the first chunk past `limit` bytes. A failure of any kind leaves no file."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise FileTooLarge(limit_bytes=limit)
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return digest.hexdigest(), size


def copy_checked(chunks: Iterable[bytes], path: Path, *, sha256: str, size: int) -> None:
    """Write `chunks` to a new file at `path`, synced; ArtifactCorrupt and no file if they are not (sha256, size)."""
    try:
        found = copy_hashing(chunks, path, size)
    except FileTooLarge as error:
        raise ArtifactCorrupt(expected_sha256=sha256, expected_size=size) from error
    try:
        check_bytes(found, sha256=sha256, size=size)
    except ArtifactCorrupt:
        path.unlink()
        raise


def receive(chunks: Iterable[bytes], path: Path, *, sha256: str, size: int) -> None:
    """Put `chunks` in the place of `path` in one step, if they are (sha256, size).

    Raises ArtifactCorrupt otherwise, and then `path` is as it was before."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    copy_checked(chunks, part, sha256=sha256, size=size)
    try:
        part.replace(path)
    except BaseException:
        part.unlink()
        raise
    sync_directory(path.parent)


def check_bytes(found: tuple[str, int], *, sha256: str, size: int) -> None:
    """Raise ArtifactCorrupt unless (sha256, size) are the ones that were promised."""
    if found != (sha256, size):
        raise ArtifactCorrupt(expected_sha256=sha256, expected_size=size, found_sha256=found[0], found_size=found[1])


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
