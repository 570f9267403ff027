"""Keys and links that open nothing."""

from registry.errors.families import Unauthenticated


class InvalidApiKey(Unauthenticated):
    """This API key is not valid here. Check for missing characters, or ask the operator for a new key."""

    code = "invalid_api_key"


class KeyRevoked(Unauthenticated):
    """This API key was revoked. Ask the operator for a new one."""

    code = "key_revoked"


class LinkInvalid(Unauthenticated):
    """This download link is not one that this service made. Copy it again, all of it."""

    code = "link_invalid"


class LinkExpired(Unauthenticated):
    """This download link has expired. Ask for the file again to get a new one."""

    code = "link_expired"
