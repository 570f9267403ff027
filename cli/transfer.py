"""Moving files to and from the depot, with a bar for who watches."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cli.client import Client, Link
from cli.connection import uses_proxies
from cli.errors import BadDownload, CommandError, NotConnected
from cli.objects import FileInfo, StoredFile
from cli.upload import ProgressFile

ATTEMPTS = 5  # in a row without a single new byte
TIMEOUT = (10.0, 60.0, 60.0, 60.0)  # seconds to connect, to read, to write, and for a free connection
OnBytes = Callable[[int], None]
GetLink = Callable[[str], Link]


def bars(console: Console) -> Progress:
    """One line per file: name, bar, bytes, speed. Silent where no terminal is."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def upload(client: Client, path: Path, *, purpose: str, progress: Progress) -> FileInfo:
    """Sends one file."""
    if not path.is_file():
        raise CommandError(f"There is no file {path}.", code="not_found")
    task = progress.add_task(path.name, total=path.stat().st_size)
    with ProgressFile(path, on_bytes=lambda count: progress.advance(task, count)) as file:
        return client.upload(file, purpose=purpose)


def upload_base(client: Client, files: Mapping[str, Path], *, progress: Progress) -> dict[str, str]:
    """Name → file id for every file. Bytes that the depot already has as an upload are not sent again, so that an
    interrupted `base add` continues where it stopped."""
    known = {file["sha256"]: file["id"] for file in client.files("base-model")}
    ids: dict[str, str] = {}
    for name, path in files.items():
        ids[name] = known.get(sha256_of(path)) or upload(client, path, purpose="base-model", progress=progress)["id"]
    return ids


def download(files: list[StoredFile], get_link: GetLink, out: Path, *, progress: Progress) -> None:
    """All `files` into the new folder `out`, which appears when every one of them is verified. What an interrupted
    download has left in `out`.partial is continued."""
    out = out.expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CommandError(f"{out} exists already. Choose another folder with --out.", code="exists")
    stage = out.with_name(out.name + ".partial")
    stage.mkdir(parents=True, exist_ok=True)
    wanted = {_safe(file["path"]): file for file in files}
    for path, file in wanted.items():
        task = progress.add_task(path, total=file["bytes"])
        fetch(file, get_link, stage / path, partial(progress.advance, task))
    present = [path for path in stage.rglob("*") if path.is_file()]
    for stray in [path for path in present if path.relative_to(stage).as_posix() not in wanted]:
        stray.unlink()  # of another version that was once on its way to the same folder
    stage.rename(out)


def fetch(file: StoredFile, get_link: GetLink, target: Path, on_bytes: OnBytes) -> None:
    """One file to `target`, continued and verified; BadDownload when its bytes are not those the server named."""
    if target.is_file() and sha256_of(target) == file["sha256"]:
        on_bytes(file["bytes"])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    continued = part.exists()
    _receive(file, get_link, part, on_bytes)
    if sha256_of(part) != file["sha256"] and continued:
        part.unlink()  # the start was another file's
        _receive(file, get_link, part, on_bytes)
    if sha256_of(part) != file["sha256"]:
        part.unlink()
        raise BadDownload(f"The bytes of {file['path']} are not the ones the server named. Try again.")
    part.replace(target)


def _receive(file: StoredFile, get_link: GetLink, part: Path, on_bytes: OnBytes) -> None:
    """Fills `part` up to the file's size, over as many connections as that takes."""
    failures = 0
    import httpx  # commands that fetch nothing do without

    on_bytes(min(_size(part), file["bytes"]))
    while failures < ATTEMPTS:
        before = _size(part)
        if before > file["bytes"]:
            part.unlink()
            before = 0
        if before == file["bytes"] and part.exists():
            return
        link = get_link(file["path"])
        if (link.sha256, link.size) != (file["sha256"], file["bytes"]):
            raise BadDownload(f"The server names other bytes for {file['path']} than its listing does.")
        with suppress(httpx.TransportError):  # the connection broke: go on behind what came, with a fresh link
            _append(link, part, on_bytes)
        failures = 0 if _size(part) > before else failures + 1
    raise NotConnected(f"The download of {file['path']} keeps breaking off. Run the command again to continue it.")


def _append(link: Link, part: Path, on_bytes: OnBytes) -> None:
    """Adds what is missing of the file to `part`. The API key stays here: the link is its own permission."""
    import httpx

    start = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    trusted = uses_proxies(link.url)
    with httpx.stream("GET", link.url, headers=headers, timeout=TIMEOUT, trust_env=trusted) as response:
        if response.status_code not in (200, 206):
            raise CommandError(f"The download link answered with status {response.status_code}.", code="bad_link")
        # A store that ignores ranges sends all of it again.
        with part.open("ab" if response.status_code == 206 else "wb") as file:
            # As it arrives: gathered into larger chunks, what came before a break would be lost.
            for chunk in response.iter_raw():
                file.write(chunk)
                on_bytes(len(chunk))
                if file.tell() > link.size:
                    break  # more than there is: verification refuses it
            file.flush()
            os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _safe(name: str) -> str:
    """A path inside the target folder, whatever the server says."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise BadDownload(f"The server names a file {name[:80]!r}, which is no path inside a folder.")
    return path.as_posix()
