"""What a stack leaves behind when its supervisor and its guardian were both killed.

Call only while holding the home's lock: then nothing that belongs to this home is in anybody's use."""

import contextlib
import signal
from pathlib import Path

from cli.embedded.guardian import end
from cli.embedded.sockets import private_socket_dir
from cli.home import Home

# In the environment of every child, so that it can be told apart from any other process of the same user.
# Not `DEPOT_…`: the service refuses settings it does not know.
MARKER = "LORA_DEPOT_CHILD_OF"
SOCKET_LOCK = ".s.PGSQL.5432.lock"


def end_leftovers(home: Home) -> list[int]:
    """Ends the processes that an earlier stack left on this home; returns their pids."""
    found = {pid: argv for pid, argv in _processes() if _is_ours(pid, argv, home)}
    # Postgres last: the others write to it.
    ordered = sorted(found, key=lambda pid: _program(found[pid]) == "postgres")
    for pid in ordered:
        end(pid, signal.SIGINT if _program(found[pid]) == "postgres" else signal.SIGTERM)
    for lock_file in (home.postgres / "postmaster.pid", private_socket_dir(home.sockets) / SOCKET_LOCK):
        _unlock(lock_file)
    return ordered


def _unlock(lock_file: Path) -> None:
    """Removes a Postgres lock whose number belongs to a stranger or a zombie: Postgres itself would give up."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(lock_file.read_text().split()[0])
        if Path(f"/proc/{pid}").exists():
            lock_file.unlink()


def _processes() -> list[tuple[int, list[str]]]:
    """Every process and its arguments. Empty without /proc: there Postgres' own lock file has to do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end while it is being looked at.
        with contextlib.suppress(OSError):
            argv = (folder / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
            found.append((int(folder.name), argv))
    return found


def _is_ours(pid: int, argv: list[str], home: Home) -> bool:
    if _program(argv) == "postgres":
        # Its environment may be unreadable: as root it runs under another uid.
        return _option(argv, "-D") == str(home.postgres)
    with contextlib.suppress(OSError):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return f"{MARKER}={home.root}".encode(errors="surrogateescape") in environment
    return False


def _program(argv: list[str]) -> str:
    return Path(argv[0]).name


def _option(argv: list[str], name: str) -> str | None:
    return argv[argv.index(name) + 1] if name in argv[:-1] else None
