"""What can go wrong in a command: each error is one sentence and a stable code, for the person at the terminal."""


class CommandError(Exception):
    """Ends the command with exit status 1. `message` says what to do next."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.message = message
        self.code = code or self.code
        super().__init__(message)


class NotConnected(CommandError):
    """No depot is known, or none answers."""

    code = "not_connected"


class Refused(CommandError):
    """The server's own answer: its code and its sentence."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message, code=code)
        self.status = status


class BadDownload(CommandError):
    """The bytes that arrived are not the bytes that the server named."""

    code = "bad_download"
