"""What a store of immutable objects can do. Callers know this, and never which store it is."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from registry.errors import StorageUnavailable
from registry.storage.digests import CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One stored object."""

    key: str
    size: int


class ObjectStore(Protocol):
    """Objects are written once under keys from `registry.storage.keys` and never change.

    Every method raises StorageUnavailable when the store does not answer, and ValueError for a key that
    `check_key` refuses. Reading a key that is not there raises ObjectMissing."""

    def put(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        """Store a local file. The bytes sent are the bytes hashed; after a return they are durable.

        Raises ArtifactCorrupt and stores nothing if the file is not (sha256, size), or if the key already holds
        other bytes. Equal bytes under the same key are a no-op, so a put may be repeated."""
        ...

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        """The bytes [start, end) in chunks, clamped to the object like a slice; `end=None` is its end.

        Errors of the request are raised by the call, a broken transfer by the iteration: what was yielded
        without an error is complete. `close()` gives up early. The digest is not checked here."""
        ...

    def stat(self, key: str) -> ObjectStat:
        """The size of an object."""
        ...

    def fetch(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        """Download to `path`, which appears complete and verified or not at all (ArtifactCorrupt)."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """Every object whose key starts with this string, in no promised order; errors come while iterating."""
        ...

    def link(self, key: str, *, filename: str, seconds: int) -> str:
        """A URL on which anyone can GET the object for so long, as an attachment called `filename`.

        The link is made without looking whether the object exists."""
        ...

    def ping(self) -> None:
        """Raise StorageUnavailable unless the store can be used."""
        ...


def check_range(start: int, end: int | None) -> None:
    """Raise ValueError unless 0 ≤ start ≤ end: offsets from the end would be a caller's mistake here."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"not a range: [{start}, {end})")


def exactly(read: Callable[[int], bytes], length: int) -> Generator[bytes, None, None]:
    """`length` bytes from `read`, in chunks; StorageUnavailable if it ends before."""
    while length:
        chunk = read(min(CHUNK_BYTES, length))
        if not chunk:
            raise StorageUnavailable(f"The object store broke off {length} bytes before the end of an object.")
        length -= len(chunk)
        yield chunk
