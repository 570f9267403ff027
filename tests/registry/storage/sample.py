"""A file whose digest is known, and the key it belongs under."""

import hashlib
import random
import uuid
from dataclasses import dataclass
from pathlib import Path

from registry.storage.keys import blob_key


@dataclass(frozen=True)
class Sample:
    path: Path
    data: bytes
    sha256: str
    size: int
    key: str

    @property
    def facts(self) -> dict[str, str | int]:
        """What put and fetch are told to expect."""
        return {"sha256": self.sha256, "size": self.size}


def make_sample(directory: Path, data: bytes | int = 1000) -> Sample:
    """A new file in `directory` of these bytes, or of so many random ones."""
    if isinstance(data, int):
        data = random.Random(data).randbytes(data)
    path = directory / uuid.uuid4().hex
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return Sample(path, data, sha256, len(data), blob_key(sha256, uuid.uuid4()))
