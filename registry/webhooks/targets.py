"""Where a webhook may be sent: never to an address inside, unless the operator allows it."""

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from registry.errors import WebhookNotAllowed

PORTS = frozenset({443, 8443})
LONGEST_URL = 2048

_VISIBLE = re.compile(r"[!-~]+")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?"
# At least two labels, and a last one that is no number: `localhost`, `2130706433` and `0x7f.1` are no names.
_NAME = re.compile(rf"(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?")
# Addresses that lead to others: translated and tunnelled IPv4.
_DETOURS = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]

Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A checked URL in the parts that a connection needs."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_target(url: str, *, allow_lan: bool = False) -> Target:
    """The target of a webhook; WebhookNotAllowed unless it is https to a public name, or `allow_lan` is on."""
    if len(url) > LONGEST_URL or not _VISIBLE.fullmatch(url):
        raise WebhookNotAllowed("The URL is at most 2048 visible ASCII characters.", param="url")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise WebhookNotAllowed("This is not a URL.", param="url") from None
    host = (parts.hostname or "").lower()
    if parts.username is not None or parts.password is not None or parts.fragment or "\\" in url or not host:
        raise WebhookNotAllowed("The URL is https://HOST[:PORT]/PATH, without user, password or fragment.", param="url")
    secure = parts.scheme == "https"
    if not secure and not (allow_lan and parts.scheme == "http"):
        raise WebhookNotAllowed(param="url")
    port = port if port is not None else (443 if secure else 80)
    if not allow_lan:
        _require_public(host, port)
    return Target(secure, host, port, _path(parts))


def resolve(target: Target, *, allow_lan: bool = False, lookup: Resolve | None = None) -> str:
    """One address of the target, looked up once; WebhookNotAllowed when any of its addresses is not public.

    The caller connects to the address it gets, so that a second answer of the name server cannot matter."""
    addresses = (lookup or _look_up)(target.host, target.port)
    if not addresses:
        raise OSError(f"{target.host} has no address")
    if not allow_lan and not all(is_public(address) for address in addresses):
        raise WebhookNotAllowed("The URL's name leads to an address that is not public.", param="url")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the internet at large, whatever way it is written."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # also an address with a scope, which is never public
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif any(address in network for network in _DETOURS):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _require_public(host: str, port: int) -> None:
    if port not in PORTS:
        raise WebhookNotAllowed("Webhooks go to port 443 or 8443.", param="url")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host):
            raise WebhookNotAllowed("The host is not a public name.", param="url") from None
    else:
        if not is_public(host):
            raise WebhookNotAllowed("The host is not a public address.", param="url")


def _path(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _look_up(host: str, port: int) -> Sequence[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
