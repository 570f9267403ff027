"""A store that counts what it sends."""

from collections.abc import Generator
from typing import Any

from registry.storage import ObjectStore


class CountingStore:
    """Another store behind a wire: its objects are fetched in parts, as from S3, and `sent` says how much of each."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.sent: dict[str, int] = {}

    def open(self, key: str, *, start: int = 0, end: int | None = None) -> Generator[bytes, None, None]:
        """As the store does."""
        for chunk in self._store.open(key, start=start, end=end):
            self.sent[key] = self.sent.get(key, 0) + len(chunk)
            yield chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)
