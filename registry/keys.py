"""API keys: `ld_` + 12 characters of id + 32 of secret + 6 of checksum, all base62.

The id is public and finds the row; the secret is stored only as HMAC-SHA256 under the service's pepper. 190 random
bits need no slow hash. The checksum refuses a mistyped or made-up key before Postgres is asked anything."""

import hmac
import re
import secrets
import string
import uuid
import zlib
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import InvalidApiKey, KeyNotFound, KeyRevoked
from registry.jobs.clock import read_clock
from registry.models import ApiKey

PREFIX = "ld_"
_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY = re.compile(r"(?P<body>ld_(?P<id>[0-9A-Za-z]{12})(?P<secret>[0-9A-Za-z]{32}))(?P<checksum>[0-9A-Za-z]{6})")
_NO_HMAC = "0" * 64


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sent a request."""

    tenant_id: uuid.UUID
    key_id: str
    name: str


def create_key(session: Session, *, tenant_id: uuid.UUID, name: str, pepper: bytes) -> str:
    """A new key of this tenant. The return value is the only copy of its secret there will ever be."""
    key_id, secret = _random(12), _random(32)
    session.add(ApiKey(tenant_id=tenant_id, name=name, key_id=key_id, secret_hmac=_seal(secret, pepper)))
    session.flush()
    body = f"{PREFIX}{key_id}{secret}"
    return body + _checksum(body)


def authenticate(session: Session, key: str, *, pepper: bytes) -> Principal:
    """Whose key this is; InvalidApiKey or KeyRevoked.

    An id that does not exist costs the same hash and comparison as one that does."""
    parts = _KEY.fullmatch(key)
    if parts is None or parts["checksum"] != _checksum(parts["body"]):
        raise InvalidApiKey
    row = session.scalar(select(ApiKey).where(ApiKey.key_id == parts["id"]))
    stored = _NO_HMAC if row is None else row.secret_hmac
    if not hmac.compare_digest(_seal(parts["secret"], pepper), stored) or row is None:
        raise InvalidApiKey
    if row.revoked_at is not None:
        raise KeyRevoked
    return Principal(tenant_id=row.tenant_id, key_id=row.key_id, name=row.name)


def revoke_key(session: Session, *, tenant_id: uuid.UUID, key_id: str) -> ApiKey:
    """Ends the key with this public id (the 12 characters after `ld_`); again changes nothing."""
    query = select(ApiKey).where(ApiKey.tenant_id == tenant_id, ApiKey.key_id == key_id)
    row = session.scalar(query.with_for_update())
    if row is None:
        raise KeyNotFound
    if row.revoked_at is None:
        row.revoked_at = read_clock(session)
        session.flush()
    return row


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _seal(secret: str, pepper: bytes) -> str:
    return hmac.digest(pepper, secret.encode("ascii"), "sha256").hex()


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode("ascii")), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits
