"""Which depot to talk to: DEPOT_URL and DEPOT_API_KEY, else what `lora-depot up` wrote into its home."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from cli.errors import NotConnected
from cli.home import Home, find_home, read_json


@dataclass(frozen=True)
class Connection:
    """`url` without a slash at its end. The key never shows in a repr."""

    url: str
    api_key: str = field(repr=False)


def find_connection(home: Home | None = None, environ: Mapping[str, str] = os.environ) -> Connection:
    """The depot that `environ` names, else that of `home`; NotConnected says what to set."""
    place = home or find_home()
    written = read_json(place.client)
    url = environ.get("DEPOT_URL") or written.get("url")
    # The home's key belongs to the home's depot: it is never sent to another address.
    key = environ.get("DEPOT_API_KEY") or (written.get("api_key") if url == written.get("url") else None)
    if not isinstance(url, str) or not url:
        raise NotConnected(f"No depot has run in {place.root}. Start one with `lora-depot up`, or set DEPOT_URL.")
    if not url.startswith(("http://", "https://")):
        raise NotConnected("DEPOT_URL must start with http:// or https://.")
    if not isinstance(key, str) or not key:
        raise NotConnected(f"There is no API key for {url}. Set DEPOT_API_KEY.")
    return Connection(url.rstrip("/"), key)


def uses_proxies(url: str) -> bool:
    """Whether a proxy of the environment may stand between us and `url`: not on the way to this very machine."""
    return urlsplit(url).hostname not in {"localhost", "127.0.0.1", "::1"}
