"""DEPOT_HOME: the one directory that holds everything the embedded stack keeps."""

import contextlib
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_HOME = "~/.lora-depot"
FOLDERS = ("valkey", "objects", "work", "cache", "logs", "run")


class HomeError(RuntimeError):
    """The home cannot be used. The message is for the person at the terminal."""


@dataclass(frozen=True)
class Home:
    """Paths below `root`. Postgres makes `pg` itself, by one rename."""

    root: Path

    @property
    def postgres(self) -> Path:
        return self.root / "pg"

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def sockets(self) -> Path:
        return self.root / "run"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def client(self) -> Path:
        """{"url", "api_key"}: what the other commands of `lora-depot` read."""
        return self.root / "client.json"

    @property
    def state(self) -> Path:
        """{"pid", "url", "children"} of the running stack; absent when none runs, `url` null until ready."""
        return self.root / "state.json"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"


def find_home(chosen: Path | None = None) -> Home:
    """`chosen`, else DEPOT_HOME, else ~/.lora-depot. Creates nothing."""
    return Home((chosen or Path(os.environ.get("DEPOT_HOME") or DEFAULT_HOME)).expanduser().absolute())


def prepare_home(home: Home) -> None:
    """Creates what is missing, private to us. Never changes the mode of a directory that is there."""
    home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = home.root.stat()
    if found.st_uid != os.geteuid():
        raise HomeError(f"{home.root} belongs to another user. Run as that user, or set DEPOT_HOME.")
    if found.st_mode & 0o022:
        raise HomeError(f"Others may write in {home.root}. Run `chmod go-w {home.root}`, or set DEPOT_HOME.")
    for folder in FOLDERS:
        (home.root / folder).mkdir(mode=0o700, exist_ok=True)


def secret_key(home: Home) -> str:
    """The service's secret, made on first use. API keys are hashed with it: it lives as long as the home."""
    path = home.root / "secret"
    if not path.exists():
        write_private(path, secrets.token_urlsafe(48))
    return path.read_text()


def write_private(path: Path, text: str) -> None:
    """Replaces `path` with mode 0600, all or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is none, or when it is not ours to understand."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_private(path, json.dumps(content, indent=2) + "\n")
