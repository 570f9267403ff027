"""Postgres refuses to run as root: the command prefix under which it agrees."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cli.embedded.process import EmbeddedError

# Any number but 0 will do, no user with it has to exist.
NAMESPACE_UID = 1000
NOBODY_UID = 65534


@dataclass(frozen=True)
class Account:
    """Who Postgres runs as: `prefix` goes before its command line, its files belong to `uid` on disk."""

    prefix: tuple[str, ...]
    uid: int


OURSELVES = Account((), os.geteuid())
# The process sees a uid that is not 0; on disk everything still belongs to root.
NAMESPACE = Account(("unshare", "--user", f"--map-user={NAMESPACE_UID}", f"--map-group={NAMESPACE_UID}", "--"), 0)
# For containers that forbid namespaces. The capability passes directories of mode 700, so none is opened.
NOBODY = Account(
    (
        "setpriv",
        f"--reuid={NOBODY_UID}",
        f"--regid={NOBODY_UID}",
        "--clear-groups",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--bounding-set=-all,+dac_override",
        "--no-new-privs",
        "--",
    ),
    NOBODY_UID,
)


def find_account(program: Path, directory: Path) -> Account:
    """The first account that can run `program` and write in `directory`, both of which exist."""
    if os.geteuid() != 0:
        return OURSELVES
    for account in (NAMESPACE, NOBODY):
        if _works(account, program, directory):
            return account
    raise EmbeddedError(
        "Postgres refuses to run as root, and here neither `unshare --user` (a user namespace) nor `setpriv` "
        f"gives it another uid that can run {program} and write in {directory}. Run `lora-depot up` as an "
        "ordinary user, or set DEPOT_HOME to a directory that belongs to root, or allow user namespaces "
        "(`sysctl -w user.max_user_namespaces=10000`; in a container: `--security-opt seccomp=unconfined`)."
    )


def _works(account: Account, program: Path, directory: Path) -> bool:
    # Really run and really write: `test -x` and `test -w` know nothing of capabilities.
    attempt = '"$1" --version && probe=$(mktemp "$2/.probe-XXXXXX") && rm "$probe"'
    argv = [*account.prefix, "sh", "-c", attempt, "sh", str(program), str(directory)]
    try:
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def hand_over(directory: Path, account: Account) -> None:
    """Makes `directory` and all below belong to `account`; a no-op unless the way of running has changed."""
    if directory.stat().st_uid == account.uid:
        return
    if os.geteuid() != 0:
        raise EmbeddedError(f"{directory} belongs to another user. Run as that user, or set DEPOT_HOME.")
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            os.chown(Path(folder, name), account.uid, account.uid, follow_symlinks=False)
        os.chown(folder, account.uid, account.uid)
