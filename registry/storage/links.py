"""Signed links to objects that the API serves itself, and the headers every download carries."""

import base64
import hashlib
import hmac
import json
import re
from urllib.parse import quote

from registry.errors import LinkExpired, LinkInvalid

CONTENT_TYPE = "application/octet-stream"
# The service has one secret for several purposes; this keeps a signature from one of them useless in another.
_PURPOSE = b"lora-depot object link\n"


def sign_link(secret: bytes, *, key: str, filename: str, expires: int) -> str:
    """A token that `open_link` turns back into (key, filename) until `expires`, in Unix seconds."""
    claims = json.dumps({"key": key, "filename": filename, "exp": expires}, separators=(",", ":"))
    payload = base64.urlsafe_b64encode(claims.encode()).decode().rstrip("=")
    return f"{payload}.{_signature(secret, payload)}"


def open_link(secret: bytes, token: str, *, now: float) -> tuple[str, str]:
    """(key, filename) of a token. Raises LinkInvalid if this service did not make it, LinkExpired if it is late."""
    payload, _, signature = token.partition(".")
    # Compared as text, so that a token has exactly one spelling; as bytes, because str would have to be ASCII.
    if not hmac.compare_digest(_signature(secret, payload).encode(), signature.encode(errors="replace")):
        raise LinkInvalid
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    if now >= claims["exp"]:
        raise LinkExpired
    return claims["key"], claims["filename"]


def _signature(secret: bytes, payload: str) -> str:
    return hmac.new(secret, _PURPOSE + payload.encode(errors="replace"), hashlib.sha256).hexdigest()


def attachment(filename: str) -> str:
    """A `Content-Disposition` that saves under `filename`, whatever characters it has (RFC 6266).

    Control characters and path separators become `_`; the plain form for old clients is ASCII only."""
    name = re.sub(r"[\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]", "_", filename)
    plain = re.sub(r'[^\x20-\x7e]|["%]', "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
