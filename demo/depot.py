"""The depot that the demo talks to: one that runs already, or one it starts with `lora-depot up` and stops again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cli.client import Client
from cli.connection import find_connection
from cli.errors import CommandError
from cli.home import Home

START_SECONDS = 120
STOP_SECONDS = 60


class DepotFailed(Exception):
    """`lora-depot up` ended, or did not get ready. The message says where its log is."""


def demo_home() -> Home:
    """DEPOT_HOME, else .demo/home here: the demo never touches a depot that it was not pointed at."""
    return Home(Path(os.environ.get("DEPOT_HOME") or ".demo/home").expanduser().absolute())


@contextmanager
def running_depot(home: Home) -> Iterator[tuple[Client, bool]]:
    """A client of the depot in `home`, and whether it was started here; then it is also stopped here."""
    client = find_client(home)
    if client is not None:
        with client:
            yield client, False
        return
    home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = home.root / "demo-up.log"
    process = start(home, log)
    try:
        with wait_until_ready(home, process, log) as client:
            yield client, True
    finally:
        stop(process)


def find_client(home: Home) -> Client | None:
    """A client if a depot answers for `home`."""
    try:
        # A DEPOT_URL in the environment is for work, not for demos.
        client = Client(find_connection(home, environ={}))
        client.readiness()
    except CommandError:
        return None
    return client


def start(home: Home, log: Path) -> "subprocess.Popen[bytes]":
    """`lora-depot up`, in a process group of its own: Ctrl-C reaches the demo, and the demo stops the stack."""
    env = {name: value for name, value in os.environ.items() if name not in ("DEPOT_URL", "DEPOT_API_KEY")}
    env["DEPOT_HOME"] = str(home.root)
    command = [sys.executable, "-m", "cli.main", "up"]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, process_group=0)


def wait_until_ready(home: Home, process: "subprocess.Popen[bytes]", log: Path) -> Client:
    """A client once everything answers; DepotFailed when it never will."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DepotFailed(f"lora-depot up ended:\n{log.read_text(errors='replace').strip()}")
        # The stack writes its client file when the API is up; an old one may name a port that others use now.
        if home.state.exists() and (client := find_client(home)) is not None:
            return client
        time.sleep(0.3)
    raise DepotFailed(f"The depot did not get ready within {START_SECONDS} seconds. Its logs: {home.root / 'logs'}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the stack as Ctrl-C would; its own guardians end what does not listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
