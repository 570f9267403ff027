"""Private directories for unix sockets, on paths short enough for the kernel."""

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from cli.embedded.process import EmbeddedError

# sockaddr_un holds 108 bytes on Linux and 104 on macOS, each with a closing zero.
MAX_SOCKET_PATH = 103
LONGEST_NAME = ".s.PGSQL.5432"
# Socket paths travel inside URLs; these characters mean themselves in every URL parser.
PLAIN = re.compile(r"[A-Za-z0-9_./-]+")


def private_socket_dir(wanted: Path) -> Path:
    """`wanted` where a socket path fits, else a stand-in under the temporary directory named by its hash.

    The directory exists, is ours and has mode 0700 when this returns."""
    wanted = wanted.absolute()
    path = wanted if _fits(wanted) else _stand_in(wanted)
    if not _fits(path):
        raise EmbeddedError(f"{path} is too long for a unix socket. Set TMPDIR to a short path such as /tmp.")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(path)
    return path


def _fits(directory: Path) -> bool:
    path = str(directory / LONGEST_NAME)
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH and PLAIN.fullmatch(path) is not None


def _stand_in(wanted: Path) -> Path:
    name = hashlib.sha256(os.fsencode(wanted)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lora-depot-{os.geteuid()}-{name}"


def _check_private(path: Path) -> None:
    # Anyone may create names in a shared temporary directory: trust only what is certainly ours.
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EmbeddedError(
            f"{path} must be a directory of yours with mode 0700, because whoever can enter it can use the "
            "database. Remove it, or point DEPOT_HOME elsewhere."
        )
