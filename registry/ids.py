"""Public ids: a prefix that names the kind, then the row's UUID in hex."""

import re
import uuid

_HEX = re.compile(r"[0-9a-f]{32}")


def public_id(prefix: str, value: uuid.UUID) -> str:
    """`file-0b0e…`: what clients see of a row's id."""
    return f"{prefix}-{value.hex}"


def parse_id(prefix: str, text: str) -> uuid.UUID | None:
    """The UUID in a public id of this kind; None for every other text, so that callers answer "not found"."""
    head, _, digits = text.rpartition("-")
    if head != prefix or not _HEX.fullmatch(digits):
        return None
    return uuid.UUID(hex=digits)
