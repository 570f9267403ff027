"""Files on their way to the server."""

import io
from collections.abc import Callable
from pathlib import Path


class ProgressFile(io.FileIO):
    """A file that tells how many bytes of it have been read. httpx streams it; it is never all in memory."""

    def __init__(self, path: Path, *, filename: str | None = None, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self.filename = filename or path.name
        self._on_bytes = on_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._on_bytes(len(data or b""))
        return data or b""
