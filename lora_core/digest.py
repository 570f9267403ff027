"""The identity of a set of files. Standard library only: a client needs it before anything loads numpy."""

import hashlib
from collections.abc import Mapping


def folder_digest(digests: Mapping[str, str]) -> str:
    """Of path → SHA-256: SHA-256 of the sorted lines '<sha256>  <path>', as hex."""
    lines = sorted(f"{sha256}  {path}\n" for path, sha256 in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
