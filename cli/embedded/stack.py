"""What the embedded stack consists of: the production commands and their settings, as data."""

import os
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from cli.embedded.postgres import postgres_url
from cli.embedded.process import ROOT, ChildSpec, EmbeddedError
from cli.embedded.valkey import valkey_url
from cli.home import Home, secret_key

HOST = "127.0.0.1"
PREFERRED_PORT = 8321
# What a child gets of the caller's environment, apart from DEPOT_… settings.
INHERITED = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
)
# In every answer of the API, so that it can be told from another depot on the same port.
MARK_HEADER = "x-depot-run"
CLIENT_SETTINGS = ("DEPOT_HOME", "DEPOT_URL", "DEPOT_API_KEY")
# On one machine a lost worker is noticed, and an idle one wakes, sooner than across a network.
ONE_MACHINE = {
    "DEPOT_HEARTBEAT_SECONDS": "2",
    "DEPOT_LEASE_SECONDS": "15",
    "DEPOT_REAPER_SECONDS": "3",
    "DEPOT_POLL_SECONDS": "2",
    "DEPOT_CHECKPOINT_SECONDS": "30",
}


@dataclass(frozen=True)
class Commands:
    """The command lines that make a depot of a Postgres and a Valkey. `create_key` prints a new API key."""

    migrate: tuple[str, ...]
    create_key: tuple[str, ...]
    api: tuple[str, ...]
    worker: tuple[str, ...]


def production_commands(port: int) -> Commands:
    """The same plain commands that the containers run."""
    python = (sys.executable, "-m")
    no_chatter = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    return Commands(
        migrate=(*python, "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"),
        create_key=(*python, "api.admin", "create-key", "--name", "local"),
        api=(
            *python,
            *("uvicorn", "--factory", "api.main:create_app", "--host", HOST, "--port", str(port)),
            *("--http", "httptools", "--timeout-graceful-shutdown", "5"),
        ),
        worker=(*python, "celery", "-A", "worker.app", "worker", "-P", "threads", "-c", "2", *no_chatter),
    )


def environment(home: Home, *, url: str, slots: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a child. DEPOT_… settings of the caller tune it, but cannot redirect it."""
    chosen = {name: inherited[name] for name in INHERITED if name in inherited}
    tuned = {k: v for k, v in inherited.items() if k.startswith("DEPOT_") and k not in CLIENT_SETTINGS}
    return {
        **chosen,
        **ONE_MACHINE,
        **tuned,
        "PYTHONUNBUFFERED": "1",
        "DEPOT_DATABASE_URL": postgres_url(home.sockets),
        "DEPOT_REDIS_URL": valkey_url(home.sockets),
        "DEPOT_STORE_URL": home.objects.as_uri(),
        "DEPOT_SECRET_KEY": secret_key(home),
        "DEPOT_PUBLIC_URL": url,
        "DEPOT_WORK_DIR": str(home.work),
        "DEPOT_CACHE_DIR": str(home.cache),
        "DEPOT_SLOTS": str(slots),
    }


def one_shot(name: str, argv: tuple[str, ...], home: Home, env: Mapping[str, str]) -> ChildSpec:
    return ChildSpec(name=name, argv=argv, env=env, log=home.log(name))


def api_spec(argv: tuple[str, ...], home: Home, env: Mapping[str, str]) -> ChildSpec:
    url, mark = env["DEPOT_PUBLIC_URL"], secrets.token_hex(8)
    return ChildSpec(
        name="api",
        argv=(*argv, "--header", f"{MARK_HEADER}:{mark}"),
        env=env,
        log=home.log("api"),
        # Another depot may have opened the port since it was chosen: its answer is not ours.
        ready=lambda: answers(f"{url}/readyz", mark=mark) == 200,
    )


def worker_spec(argv: tuple[str, ...], home: Home, env: Mapping[str, str]) -> ChildSpec:
    # A trainer that is asked to stop writes a checkpoint first.
    return ChildSpec(name="worker", argv=argv, env=env, log=home.log("worker"), stop_seconds=30)


def answers(url: str, *, api_key: str | None = None, mark: str | None = None) -> int | None:
    """The status of a GET; None while nobody answers, or nobody who carries `mark`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # A proxy of the environment has no business between two processes of one machine.
        response = httpx.get(url, headers=headers, timeout=5, trust_env=False)
    except httpx.TransportError:
        return None
    return response.status_code if mark in (None, response.headers.get(MARK_HEADER)) else None


def is_free(port: int) -> bool:
    return _bind(port) is not None


def choose_port(wanted: int | None) -> int:
    """`wanted`, or EmbeddedError when it is taken; without a wish the usual port, else any free one."""
    if wanted is None:
        return _bind(PREFERRED_PORT) or _bind(0) or _no_port()
    found = _bind(wanted)
    if found is None:
        raise EmbeddedError(f"Port {wanted} is taken or not allowed. Choose another one, or leave --port out.")
    return found


def _bind(port: int) -> int | None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server will: connections of an earlier run that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _no_port() -> int:
    raise EmbeddedError(f"No port of {HOST} can be opened here (pid {os.getpid()}).")
