"""One delivery of a webhook: signed, to the address that was checked, and with bounds on everything that comes back."""

import base64
import hashlib
import hmac
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException

from registry.webhooks.targets import Resolve, Target, parse_target, resolve

SECONDS = 5.0
MOST_BYTES = 64 * 2**10


def sign(secrets: Sequence[bytes], *, event_id: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks' signature: one `v1,…` per secret in force."""
    content = f"{event_id}.{timestamp}.".encode() + body
    digests = (hmac.new(secret, content, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def deliver(
    url: str,
    body: bytes,
    *,
    secrets: Sequence[bytes],
    event_id: str,
    timestamp: int,
    allow_lan: bool = False,
    lookup: Resolve | None = None,
) -> int:
    """Posts an event and answers the status of the reply, whose content is not looked at; redirects are not followed.

    WebhookNotAllowed, or OSError when there was no reply within five seconds."""
    target = parse_target(url, allow_lan=allow_lan)
    address = resolve(target, allow_lan=allow_lan, lookup=lookup)
    headers = {
        "Host": target.authority,
        "Content-Type": "application/json",
        "User-Agent": "lora-depot",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secrets, event_id=event_id, timestamp=timestamp, body=body),
    }
    connection = _Pinned(target, address)
    # A reply may drip for ever within every single read's timeout: the clock runs over all of it.
    deadline = threading.Timer(SECONDS, connection.cut)
    deadline.daemon = True
    deadline.start()
    try:
        connection.request("POST", target.path, body, headers)
        response = connection.getresponse()
        response.read(MOST_BYTES)
        return response.status
    except HTTPException as error:
        raise OSError(f"the reply is not HTTP: {type(error).__name__}") from error
    finally:
        deadline.cancel()
        connection.close()


class _Pinned(HTTPConnection):
    """A connection to one address, whatever the name may lead to now."""

    def __init__(self, target: Target, address: str) -> None:
        super().__init__(target.host, target.port, timeout=SECONDS)
        self._target, self._address = target, address
        self._raw: socket.socket | None = None
        self._late = False

    def connect(self) -> None:
        self._raw = self.sock = socket.create_connection((self._address, self._target.port), SECONDS)
        if self._target.secure:
            self.sock = ssl.create_default_context().wrap_socket(self._raw, server_hostname=self._target.host)
            self._raw = self.sock
        if self._late:
            raise TimeoutError("the connection took too long")

    def cut(self) -> None:
        self._late = True
        if self._raw is not None:
            with suppress(OSError):
                self._raw.shutdown(socket.SHUT_RDWR)
