"""Object keys. Every key in the system is built here, and every store checks its keys here."""

import re
import uuid

_SEGMENT = r"[a-z0-9][a-z0-9_.-]{0,254}"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_KEY = 900  # S3 ends at 1024 bytes, and a store may put its own prefix in front


def blob_key(sha256: str, blob_id: uuid.UUID) -> str:
    """Where the bytes of one blob lie.

    The digest says what they must be. The id makes the key the writer's own: a worker that lost its lease
    cannot write under the winner's key, and deleting one blob never touches another upload of equal bytes."""
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"not a sha256 in lower-case hex: {sha256!r}")
    return f"blobs/{sha256[:2]}/{sha256}/{blob_id.hex}"


def is_key(text: str) -> bool:
    """Whether `text` is segments of a-z 0-9 _ . - that start with a letter or digit, joined by single slashes."""
    return bool(_KEY.fullmatch(text)) and ".." not in text and len(text) <= _MAX_KEY


def check_key(key: str) -> str:
    """Return `key`; raise ValueError unless it is one."""
    if not is_key(key):
        raise ValueError(f"not an object key: {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`; raise ValueError unless some key can start with it. The empty prefix starts every key."""
    if prefix and not is_key(f"{prefix}0"):
        raise ValueError(f"not the start of an object key: {prefix!r}")
    return prefix


def key_sha256(key: str) -> str:
    """The digest of the bytes that lie under a `blob_key`."""
    return key.split("/")[2]
