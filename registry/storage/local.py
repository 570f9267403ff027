"""Objects as files under one directory: the embedded default."""

import os
import stat
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import ObjectMissing, StorageUnavailable
from registry.storage import links
from registry.storage.base import ObjectStat, check_range, exactly
from registry.storage.digests import (
    check_bytes,
    copy_checked,
    digest_file,
    file_chunks,
    receive,
    sync_directory,
)
from registry.storage.keys import check_key, check_prefix, is_key

_STALE_SECONDS = 24 * 3600


class LocalStore:
    """An ObjectStore in `directory`, whose links are answered by the API at `public_url`.

    Several processes may share the directory. Symbolic links inside it are never followed. Its file system
    needs hard links, which is how a name is taken without ever replacing what has it."""

    def __init__(self, directory: Path, *, secret: bytes, public_url: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._root = directory.resolve(strict=True)
        # No key starts with a dot, so nothing in here is ever listed. Being there, it also tells a
        # mounted store from the empty mount point that an unmounted one leaves behind.
        self._incoming = self._root / ".incoming"
        self._incoming.mkdir(exist_ok=True)
        self._secret = secret
        self._public_url = public_url.rstrip("/")
        self._remove_stale_parts()

    def put(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        target = self._path(key)
        part = self._incoming / uuid.uuid4().hex
        with path.open("rb") as source, _outages(self._incoming, key):
            copy_checked(file_chunks(source), part, sha256=sha256, size=size)
            try:
                _name(part, target, sha256=sha256, size=size)
            finally:
                part.unlink()
            for folder in target.relative_to(self._root).parents:
                sync_directory(self._root / folder)

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        check_range(start, end)
        path = self._path(key)
        with _outages(self._incoming, key):
            file = path.open("rb")
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
        length = max(0, min(size, size if end is None else end) - start)

        def chunks() -> Generator[bytes, None, None]:
            with file, _outages(self._incoming, key):
                yield from exactly(file.read, length)

        return chunks()

    def stat(self, key: str) -> ObjectStat:
        path = self._path(key)
        with _outages(self._incoming, key):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ObjectMissing(key=key)
        return ObjectStat(key, status.st_size)

    def fetch(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        receive(self.open(key), path, sha256=sha256, size=size)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(ObjectMissing), _outages(self._incoming, key):
            path.unlink()
            sync_directory(path.parent)
        with suppress(OSError):  # the first folder that still holds something ends it
            for folder in path.relative_to(self._root).parents:
                (self._root / folder).rmdir()

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        folder = self._root / check_prefix(prefix).rpartition("/")[0]
        with _outages(self._incoming, prefix):
            self._incoming.stat()
        for place, folders, names in os.walk(folder, onerror=_stop_walk):
            folders[:] = filter(is_key, folders)  # not .incoming, and not a file system's lost+found
            for name in names:
                file = Path(place, name)
                key = file.relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    with suppress(ObjectMissing, ValueError):  # deleted meanwhile; no key, or a symbolic link
                        yield self.stat(key)

    def link(self, key: str, *, filename: str, seconds: int) -> str:
        expires = int(time.time()) + seconds
        token = links.sign_link(self._secret, key=check_key(key), filename=filename, expires=expires)
        return f"{self._public_url}/v1/objects/{token}"

    def open_link(self, token: str, *, now: float) -> tuple[str, str]:
        """(key, filename) of a token from `link`. Raises LinkInvalid or LinkExpired."""
        return links.open_link(self._secret, token, now=now)

    def file(self, key: str) -> Path:
        """Where the object lies, for reading in place; ObjectMissing."""
        self.stat(key)
        return self._path(key)

    def ping(self) -> None:
        with _outages(self._incoming, ""), tempfile.TemporaryFile(dir=self._incoming):
            pass

    def _path(self, key: str) -> Path:
        path = self._root / check_key(key)
        if path.resolve() != path:
            raise ValueError(f"a symbolic link lies on the way to {key!r}")
        return path

    def _remove_stale_parts(self) -> None:
        """Remove what a killed process left half-written, once no put can still be writing it."""
        for part in self._incoming.iterdir():
            with suppress(FileNotFoundError):  # another process removes them too
                if part.stat().st_mtime < time.time() - _STALE_SECONDS:
                    part.unlink()


def _name(part: Path, target: Path, *, sha256: str, size: int) -> None:
    """Give a complete file its final name, unless the name is taken by equal bytes already."""
    for _ in range(100):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(part, target)  # unlike a rename, this never replaces
        except FileExistsError:
            if target.is_file():
                return check_bytes(digest_file(target), sha256=sha256, size=size)
        except FileNotFoundError:
            pass  # a delete removed the empty folder before the file was in it
        else:
            return None
    raise StorageUnavailable("The folder of this object cannot be made.")


@contextmanager
def _outages(incoming: Path, key: str) -> Iterator[None]:
    """Turn what the operating system says into what callers of a store know."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if incoming.is_dir():
            raise ObjectMissing(key=key) from error
        raise StorageUnavailable("The store's directory is gone.") from error
    except OSError as error:
        raise StorageUnavailable(f"The store's directory fails: {error.strerror}.") from error


def _stop_walk(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StorageUnavailable(f"The store's directory fails: {error.strerror}.") from error
